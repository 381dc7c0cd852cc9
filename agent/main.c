/* The guest agent: one thread, one loop, static memory. PROTOCOL.md says what it does. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include "boot.h"
#include "dial.h"
#include "exec.h"
#include "metrics.h"
#include "port.h"
#include "power.h"
#include "proc.h"
#include "pump.h"
#include "reclaim.h"
#include "serve.h"

enum { FILES_SOFT = 8192, FILES_HARD = 1048576, POWER_GRACE_MS = 3000 };

/* What the poweroff and halt of busybox, sysvinit and systemd send to PID 1. */
static const int power_signals[] = {SIGUSR1, SIGUSR2, SIGPWR, 34 + 3, 34 + 4};

static int signals = -1;

static void block_signals(void)
{
	/* Blocked, not ignored: a child gets a clean mask with one call, and writing to a closed pipe still only fails. */
	sigset_t taken;
	static const uint64_t all = ~(uint64_t)0; /* musl's sigfillset() keeps a few for itself */
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof all);
	sigemptyset(&taken);
	sigaddset(&taken, SIGCHLD);
	for (size_t i = 0; i < sizeof power_signals / sizeof *power_signals; i++)
		sigaddset(&taken, power_signals[i]);
	signals = signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void take_signal(void)
{
	struct signalfd_siginfo s;
	int status;
	pid_t pid;
	if (read(signals, &s, sizeof s) == sizeof s && s.ssi_signo != SIGCHLD && getpid() == 1)
		power_off_soon(POWER_GRACE_MS);
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		proc_reaped(pid, status);
}

static int sooner(int a, int b)
{
	return a < 0 ? b : b < 0 ? a : a < b ? a : b;
}

static int sleep_ms(void)
{
	int ms = proc_deadlines();
	/* What a connection's deadline would say has to wait; a process's says nothing. */
	if (!port_quiet)
		ms = sooner(ms, dial_deadlines());
	return sooner(ms, power_due(port_empty()));
}

static _Noreturn void loop(bool test)
{
	static struct pollfd fds[2 + PUMP_POLL_MAX];
	bool backlog = false, more = false;
	for (;;) {
		int ms = more && port_empty() ? 0 : sleep_ms();
		/* A deadline may just have said something. */
		if (!port_empty())
			port_flush();
		fds[0] = port_pollfd(!backlog);
		fds[1] = (struct pollfd){.fd = signals, .events = POLLIN};
		int n = port_quiet ? 0 : pump_poll(fds + 2);
		if (poll(fds, (nfds_t)n + 2, sooner(ms, port_retry_ms())) < 0)
			continue;
		/* What was polled comes first: nothing before it may open a descriptor that has a polled one's number. */
		pump_polled(fds + 2, n);
		if (fds[1].revents)
			take_signal();
		if (port_event(fds[0].revents) == PORT_GONE) {
			serve_disconnect();
			if (test)
				power_off_soon(0);
		}
		do {
			backlog = serve_input();
			more = !port_quiet && pump_emit();
			port_flush();
		} while (backlog && port_empty());
	}
}

static void limits(void)
{
	struct rlimit files = {FILES_SOFT, FILES_HARD};
	setrlimit(RLIMIT_NOFILE, &files);
	umask(022);
}

int main(int argc, char **argv)
{
	struct boot boot = {.port_fd = -1, .proc_fd = -1, .sys_fd = -1, .init = NULL};
	block_signals();
	limits();
	if (argc == 3 && strcmp(argv[1], "--fd") == 0)
		boot_beside(&boot, atoi(argv[2]));
	else
		boot_machine(&boot, argv[0]);
	mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT);
	slots_begin();
	if (!boot.test) {
		exec_begin(getpid() == 1);
		reclaim_begin(boot.proc_fd, boot.sys_fd);
	}
	port_begin(boot.port_fd);
	metrics_begin(boot.proc_fd, boot.sys_fd);
	serve_begin(boot.proc_fd);
	power_begin(boot.test ? POWER_EXIT : getpid() == 1 ? POWER_SELF : POWER_ASK_INIT);
	boot_ready();
	loop(boot.test);
}
