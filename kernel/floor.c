/* The boot floor: an init that says it is there and waits. The time to its line is the least that any boot can take.
 * No C library, so that nothing but the kernel is measured. SIGUSR2 and SIGINT (ctrl-alt-del) power off. x86-64. */

#include <asm/unistd.h>
#include <linux/reboot.h>

static long call(long number, long a, long b, long c, long d) {
	register long r10 __asm__("r10") = d;
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return result;
}

static void main_loop(void) {
	static const char line[] = "ramet-floor\n";
	unsigned long signals = 1ul << (2 - 1) | 1ul << (12 - 1); /* SIGINT, SIGUSR2 */

	call(__NR_rt_sigprocmask, 0, (long)&signals, 0, sizeof signals);
	call(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_CAD_OFF, 0);
	/* The kernel opened /dev/console as 0, 1 and 2. */
	call(__NR_write, 1, (long)line, sizeof line - 1, 0);
	while (call(__NR_rt_sigtimedwait, (long)&signals, 0, 0, sizeof signals) < 0)
		;
	call(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF, 0);
}

__attribute__((naked, noreturn, used)) void _start(void) {
	__asm__("xor %%ebp, %%ebp\n\tand $-16, %%rsp\n\tcall *%0\n\thlt" : : "r"(main_loop));
}
