#ifndef RAMET_NET_H
#define RAMET_NET_H

/* Interfaces, name servers and the machine's name, as the kernel's command line says. */
void net_configure(void);

#endif
