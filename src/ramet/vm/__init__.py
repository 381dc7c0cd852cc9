"""Virtual machines: QEMU's command line, its process, and whether KVM works here."""
