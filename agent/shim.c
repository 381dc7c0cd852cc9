/*
 * ramet-shim DIR CAP [--lock FD] [--small-pages] -- PROGRAM ARGS...
 *
 * Starts PROGRAM out of reach of whoever called, keeps its output in DIR/console.log and DIR/qemu.log (at most 2 * CAP bytes each, with their
 * predecessors NAME.1), says in DIR/pids who runs and in DIR/exit how PROGRAM ended. The caller's process returns as soon as PROGRAM runs.
 * Descriptors that were passed in go to PROGRAM only, except the lock: it is held as long as either of the two lives.
 * With --small-pages PROGRAM gets no huge pages that it did not ask for by name.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 64 * 1024, MESSAGE = 512 };

struct log {
	const char *name;
	int pipe; /* from PROGRAM; -1 when it has ended */
	int file; /* -1: it could not be opened, or is not there yet */
	long long size;
};

static int directory, lock_fd = -1, report = -1;
static bool small_pages;
static long long cap;
static struct log logs[2] = {{"console.log", -1, -1, 0}, {"qemu.log", -1, -1, 0}};
static sigset_t callers_mask;
static pid_t program; /* 0: not started */
static const char success[] = "ok", exit_aside[] = ".exit.new";

/* To the caller's process: success, or what went wrong. */
static void tell(const char *message)
{
	(void)!write(report, message, strlen(message));
	close(report);
	report = -1;
}

static _Noreturn void give_up(const char *what, int error)
{
	char message[MESSAGE];
	snprintf(message, sizeof message, "%s: %s", what, strerror(error));
	if (program > 0)
		kill(program, SIGKILL);
	if (report >= 0)
		tell(message);
	else
		fprintf(stderr, "ramet-shim: %s\n", message);
	_exit(1);
}

/* --- files in DIR --- */

/* Field 22 of /proc/PID/stat: with it, a process id cannot be mistaken for a later process's. */
static unsigned long long start_time(pid_t pid)
{
	char path[64], text[1024];
	snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	char *p = strrchr(text, ')');
	for (int field = 2; p && field < 22; field++)
		p = strchr(p + 1, ' ');
	return p ? strtoull(p, NULL, 10) : 0;
}

/* Written aside first. Overwriting what is there already, rather than truncating it, needs no new space. */
static bool write_aside(const char *aside, const char *text)
{
	size_t n = strlen(text);
	int fd = openat(directory, aside, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	bool good = fd >= 0 && write(fd, text, n) == (ssize_t)n && ftruncate(fd, (off_t)n) == 0;
	if (fd >= 0)
		close(fd);
	return good;
}

static bool write_atomically(const char *name, const char *aside, const char *text)
{
	return write_aside(aside, text) && renameat(directory, aside, directory, name) == 0;
}

static void record_start(void)
{
	char text[160];
	snprintf(text, sizeof text, "shim %d %llu\nqemu %d %llu\n", (int)getpid(), start_time(getpid()), (int)program, start_time(program));
	/* The space for the last words is taken while there is some: the disk may be full by then. */
	if (!write_aside(exit_aside, text) || !write_atomically("pids", ".pids.new", text)) {
		int error = errno ? errno : EIO;
		unlinkat(directory, exit_aside, 0);
		unlinkat(directory, ".pids.new", 0);
		give_up("pids", error);
	}
}

static void record_end(int status)
{
	char text[64];
	bool signaled = WIFSIGNALED(status);
	snprintf(text, sizeof text, "%s %d %lld\n", signaled ? "signaled" : "exited", signaled ? WTERMSIG(status) : WEXITSTATUS(status),
		 (long long)time(NULL));
	write_atomically("exit", exit_aside, text);
}

static void log_open(struct log *l)
{
	struct stat st;
	l->file = openat(directory, l->name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
	l->size = l->file >= 0 && fstat(l->file, &st) == 0 ? st.st_size : 0;
}

static void log_rotate(struct log *l)
{
	char old[64];
	snprintf(old, sizeof old, "%s.1", l->name);
	close(l->file);
	/* Whatever goes wrong, the file must not grow for ever. */
	if (renameat(directory, l->name, directory, old) < 0)
		unlinkat(directory, l->name, 0);
	log_open(l);
}

/* What cannot be written is dropped: a full disk must not stop PROGRAM. */
static void log_write(struct log *l, const char *p, size_t n)
{
	while (n > 0) {
		if (l->file < 0)
			log_open(l);
		if (l->file >= 0 && l->size >= cap)
			log_rotate(l);
		if (l->file < 0)
			return;
		size_t part = (long long)n < cap - l->size ? n : (size_t)(cap - l->size);
		ssize_t done = write(l->file, p, part);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return;
		l->size += done;
		p += done;
		n -= (size_t)done;
	}
}

/* --- processes --- */

static bool is_kept(int fd)
{
	return fd <= 2 || fd == directory || fd == lock_fd || fd == report || fd == logs[0].pipe || fd == logs[1].pipe || fd == logs[0].file ||
	       fd == logs[1].file;
}

/* A passed socket must be seen to close when PROGRAM closes it. */
static void close_the_rest(void)
{
	DIR *dir = opendir("/proc/self/fd");
	if (!dir)
		give_up("/proc/self/fd", errno);
	for (struct dirent *entry; (entry = readdir(dir));) {
		int fd = atoi(entry->d_name);
		if (entry->d_name[0] != '.' && fd != dirfd(dir) && !is_kept(fd))
			close(fd);
	}
	closedir(dir);
}

static void null_streams(void)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0)
		give_up("/dev/null", errno);
	for (int i = 0; i < 3; i++)
		dup2(null, i);
}

static _Noreturn void become_program(char **argv, const int *output, int failure)
{
	setsid();
	dup2(output[0], 1);
	dup2(output[1], 2);
	sigprocmask(SIG_SETMASK, &callers_mask, NULL);
	/* Where Yama restricts it, only by this may the daemon, which is not an ancestor, read the guest's memory to save it. */
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
	if (small_pages)
		prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	execvp(argv[0], argv);
	int error = errno;
	(void)!write(failure, &error, sizeof error);
	_exit(127);
}

static pid_t start_program(char **argv)
{
	int out[2], err[2], failure[2], error = 0;
	if (pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0 || pipe2(failure, O_CLOEXEC) < 0)
		give_up("pipe", errno);
	pid_t pid = fork();
	if (pid < 0)
		give_up("fork", errno);
	if (pid == 0)
		become_program(argv, (int[]){out[1], err[1]}, failure[1]);
	close(out[1]);
	close(err[1]);
	close(failure[1]);
	if (read(failure[0], &error, sizeof error) == sizeof error) {
		waitpid(pid, NULL, 0);
		give_up(argv[0], error);
	}
	close(failure[0]);
	logs[0].pipe = out[0];
	logs[1].pipe = err[0];
	for (int i = 0; i < 2; i++)
		fcntl(logs[i].pipe, F_SETFL, O_NONBLOCK);
	return pid;
}

/* --- the supervisor --- */

static void log_pump(struct log *l)
{
	static char chunk[CHUNK];
	ssize_t n = read(l->pipe, chunk, sizeof chunk);
	if (n > 0) {
		log_write(l, chunk, (size_t)n);
	} else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
		close(l->pipe);
		l->pipe = -1;
	}
}

/* What was in the pipes when PROGRAM ended; others who hold them open, and go on writing, are not waited for. */
static void log_drain(struct log *l)
{
	for (int i = 0; i < 1024 * 1024 / CHUNK && l->pipe >= 0; i++) {
		struct pollfd p = {.fd = l->pipe, .events = POLLIN};
		if (poll(&p, 1, 0) <= 0)
			return;
		log_pump(l);
	}
}

/* True when PROGRAM has ended. */
static bool handle_signal(int signals)
{
	struct signalfd_siginfo s;
	int status;
	if (read(signals, &s, sizeof s) != sizeof s)
		return false;
	if (s.ssi_signo == SIGTERM)
		kill(program, SIGTERM);
	if (s.ssi_signo != SIGCHLD || waitpid(program, &status, WNOHANG) != program)
		return false;
	log_drain(&logs[0]);
	log_drain(&logs[1]);
	record_end(status);
	return true;
}

static _Noreturn void supervise(char **argv, const sigset_t *handled)
{
	null_streams();
	program = start_program(argv);
	log_open(&logs[0]);
	log_open(&logs[1]);
	close_the_rest();
	int signals = signalfd(-1, handled, SFD_CLOEXEC);
	if (signals < 0 || chdir("/") < 0)
		give_up("signalfd", errno);
	record_start();
	tell(success);
	for (;;) {
		struct pollfd p[3] = {
			{.fd = signals, .events = POLLIN}, {.fd = logs[0].pipe, .events = POLLIN}, {.fd = logs[1].pipe, .events = POLLIN}};
		if (poll(p, 3, -1) < 0)
			continue;
		for (int i = 0; i < 2; i++)
			if (p[i + 1].revents)
				log_pump(&logs[i]);
		if (p[0].revents && handle_signal(signals))
			_exit(0);
	}
}

/* --- the caller's process --- */

static _Noreturn void usage(void)
{
	fputs("usage: ramet-shim DIR CAP [--lock FD] [--small-pages] -- PROGRAM ARGS...\n", stderr);
	exit(1);
}

static char **parse(int argc, char **argv)
{
	char *positional[2] = {NULL, NULL};
	int i = 1, n = 0;
	for (; i < argc && strcmp(argv[i], "--") != 0; i++) {
		if (strcmp(argv[i], "--lock") == 0 && i + 1 < argc)
			lock_fd = atoi(argv[++i]);
		else if (strcmp(argv[i], "--small-pages") == 0)
			small_pages = true;
		else if (n < 2)
			positional[n++] = argv[i];
		else
			usage();
	}
	if (n < 2 || i + 1 >= argc || (cap = atoll(positional[1])) <= 0)
		usage();
	directory = open(positional[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (directory < 0)
		give_up(positional[0], errno);
	return argv + i + 1;
}

static sigset_t take_signals(void)
{
	static const int wanted[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGQUIT};
	sigset_t handled;
	sigemptyset(&handled);
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
		sigaddset(&handled, wanted[i]);
	sigprocmask(SIG_BLOCK, &handled, &callers_mask);
	return handled;
}

int main(int argc, char **argv)
{
	char message[MESSAGE];
	int answer[2], status;
	/* A descriptor of ours must not become somebody's stdout. */
	while ((status = open("/dev/null", O_RDWR)) >= 0 && status <= 2)
		;
	close(status);
	char **command = parse(argc, argv);
	sigset_t handled = take_signals();
	if (pipe2(answer, O_CLOEXEC) < 0)
		give_up("pipe", errno);
	pid_t pid = fork();
	if (pid < 0)
		give_up("fork", errno);
	if (pid == 0) {
		report = answer[1];
		setsid();
		pid = fork();
		if (pid < 0)
			give_up("fork", errno);
		if (pid == 0)
			supervise(command, &handled);
		_exit(0);
	}
	close(answer[1]);
	waitpid(pid, &status, 0);
	size_t n = 0;
	for (ssize_t got; n < sizeof message - 1 && (got = read(answer[0], message + n, sizeof message - 1 - n)) > 0;)
		n += (size_t)got;
	message[n] = 0;
	if (strcmp(message, success) == 0)
		return 0;
	fprintf(stderr, "ramet-shim: %s\n", n ? message : "the supervisor ended at once");
	return 1;
}
