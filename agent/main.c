/* The guest agent: one thread, one loop, static memory. PROTOCOL.md says what it does. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
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
#include "serve.h"

enum { FILES_SOFT = 8192, FILES_HARD = 1048576 };

static int child_signals = -1;

static void block_signals(void)
{
	/* Blocked, not ignored: a child gets a clean mask with one call, and writing to a closed pipe still only fails. */
	sigset_t all, child;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	child_signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void reap(void)
{
	struct signalfd_siginfo ignored;
	int status;
	pid_t pid;
	(void)!read(child_signals, &ignored, sizeof ignored);
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		proc_reaped(pid, status);
}

static int sooner(int a, int b)
{
	return a < 0 ? b : b < 0 ? a : a < b ? a : b;
}

static int sleep_ms(void)
{
	int ms = sooner(proc_deadlines(), dial_deadlines());
	return sooner(ms, sooner(port_retry_ms(), power_due(port_empty())));
}

static _Noreturn void loop(void)
{
	static struct pollfd fds[2 + PUMP_POLL_MAX];
	bool backlog = false, more = false;
	for (;;) {
		fds[0] = port_pollfd(!backlog);
		fds[1] = (struct pollfd){.fd = child_signals, .events = POLLIN};
		int n = pump_poll(fds + 2);
		if (poll(fds, (nfds_t)n + 2, more && port_empty() ? 0 : sleep_ms()) < 0)
			continue;
		/* What was polled comes first: nothing before it may open a descriptor that has a polled one's number. */
		pump_polled(fds + 2, n);
		if (fds[1].revents)
			reap();
		if (port_event(fds[0].revents) == PORT_GONE)
			serve_disconnect();
		do {
			backlog = serve_input();
			more = pump_emit();
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
	struct boot boot = {.port_fd = -1, .proc_fd = -1, .init = NULL};
	block_signals();
	limits();
	if (argc == 3 && strcmp(argv[1], "--fd") == 0)
		boot_beside(&boot, atoi(argv[2]));
	else
		boot_machine(&boot, argv[0]);
	mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT);
	slots_begin();
	exec_begin(getpid() == 1);
	port_begin(boot.port_fd);
	metrics_begin(boot.proc_fd);
	serve_begin(boot.proc_fd);
	power_begin(boot.test ? POWER_EXIT : getpid() == 1 ? POWER_SELF : POWER_ASK_INIT);
	boot_ready();
	loop();
}
