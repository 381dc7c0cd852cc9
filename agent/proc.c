#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "exec.h"
#include "port.h"
#include "proc.h"
#include "terminal.h"

enum {
	KILL_AFTER_MS = 2000,
	/* More than a terminal can hold: there, reading until nothing comes is exact anyway. */
	TERMINAL_LEFT = 256 * 1024,
};

static uint32_t last_id;

/* --- starting --- */

/* Both ends of what connects the agent with the child; -1 where there is nothing. */
struct plumbing {
	int ours[3], theirs[3];
};

static void shut(int *fd, int n)
{
	for (int i = 0; i < n; i++) {
		if (fd[i] >= 0 && (i == 0 || fd[i] != fd[i - 1]) && (i != 2 || fd[i] != fd[0]))
			close(fd[i]);
	}
}

static int one_pipe(int *read_end, int *write_end, bool ours_reads)
{
	int p[2];
	if (pipe2(p, O_CLOEXEC) < 0)
		return -1;
	*read_end = p[0];
	*write_end = p[1];
	return fcntl(p[ours_reads ? 0 : 1], F_SETFL, O_NONBLOCK | (ours_reads ? O_RDONLY : O_WRONLY));
}

int null_fd = -1;

static int lay_pipes(struct plumbing *p, const struct request *r)
{
	p->theirs[0] = null_fd;
	if ((r->flags & OPEN_STDIN) && one_pipe(&p->theirs[0], &p->ours[0], false) < 0)
		return -1;
	if (one_pipe(&p->ours[1], &p->theirs[1], true) < 0)
		return -1;
	return one_pipe(&p->ours[2], &p->theirs[2], true);
}

static int lay_terminal(struct plumbing *p, const struct request *r)
{
	int terminal, process;
	if (terminal_open(&terminal, &process, r->rows, r->cols) < 0)
		return -1;
	p->ours[0] = p->ours[1] = terminal;
	p->theirs[0] = p->theirs[1] = p->theirs[2] = process;
	return 0;
}

static void describe(struct slot *s, const struct request *r)
{
	struct timespec t;
	size_t at = 0;
	clock_gettime(CLOCK_REALTIME_COARSE, &t);
	s->started_ms = (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
	snprintf(s->name, sizeof s->name, "%s", r->name ? r->name : "");
	for (int i = 0; i < r->argc && at + 1 < sizeof s->command; i++) {
		size_t n = strlen(r->argv[i]);
		if (i > 0)
			s->command[at++] = ' ';
		if (n > sizeof s->command - 1 - at)
			n = sizeof s->command - 1 - at;
		memcpy(s->command + at, r->argv[i], n);
		at += n;
	}
	s->command[at] = 0;
}

static void adopt(struct slot *s, const struct plumbing *p, const struct request *r, pid_t pid)
{
	s->pid = pid;
	s->id = ++last_id;
	s->pty = r->flags & OPEN_PTY;
	s->detach = r->flags & OPEN_DETACH;
	s->builtin = r->flags & OPEN_BUILTIN;
	s->started_due = true;
	s->in.fd = p->ours[0];
	s->in.done = p->ours[0] < 0;
	for (int c = 0; c < 2; c++) {
		s->out[c].fd = p->ours[c + 1];
		s->out[c].exists = p->ours[c + 1] >= 0;
	}
	if (given(r, TAG_TIMEOUT))
		s->deadline = deadline_after(r->timeout_ms);
	describe(s, r);
}

void proc_exec(uint32_t stream, struct request *r)
{
	static char message[MESSAGE_MAX];
	struct plumbing p = {{-1, -1, -1}, {-1, -1, -1}};
	struct slot *s = slot_new(PROCESS, stream);
	if (!s) {
		port_end(stream, END_FAILED, EAGAIN, "too many processes");
		return;
	}
	bool pty = r->flags & OPEN_PTY;
	pid_t pid = -1;
	if ((pty ? lay_terminal(&p, r) : lay_pipes(&p, r)) < 0) {
		int error = errno;
		snprintf(message, sizeof message, "cannot make a %s: %s", pty ? "terminal" : "pipe", strerror(error));
		errno = error;
	} else {
		struct launch l = {r, {p.theirs[0], p.theirs[1], p.theirs[2]}, pty};
		pid = exec_launch(&l, message, sizeof message);
	}
	int error = errno;
	if (p.theirs[0] == null_fd)
		p.theirs[0] = -1;
	shut(p.theirs, 3);
	if (pid < 0) {
		shut(p.ours, 3);
		slot_free(s);
		port_end(stream, END_FAILED, error, message);
		return;
	}
	adopt(s, &p, r, pid);
}

/* --- the other ops on processes --- */

static struct slot *named(uint32_t stream, const struct request *r)
{
	struct slot *s = given(r, TAG_PROCESS) ? slot_of_process(r->process) : NULL;
	if (!s)
		port_end(stream, END_FAILED, ESRCH, "no such process");
	return s;
}

void proc_attach(uint32_t stream, const struct request *r)
{
	struct slot *s = named(stream, r);
	if (!s)
		return;
	if (s->stream)
		port_end(s->stream, END_DETACHED, 0, NULL);
	slot_attach(s, stream);
	s->started_due = true;
}

static void answer(uint32_t stream, int result, const char *what)
{
	if (result < 0) {
		char message[128];
		int error = errno;
		snprintf(message, sizeof message, "%s: %s", what, strerror(error));
		port_end(stream, END_FAILED, error, message);
	} else {
		port_end(stream, END_EXITED, 0, NULL);
	}
}

void proc_signal(uint32_t stream, const struct request *r)
{
	struct slot *s = named(stream, r);
	if (!s)
		return;
	errno = ESRCH;
	if (r->signal > 64 || !given(r, TAG_SIGNAL))
		port_end(stream, END_FAILED, EINVAL, "no such signal");
	else
		answer(stream, s->pid ? kill(-s->pid, (int)r->signal) : -1, "the process has ended");
}

void proc_resize(uint32_t stream, const struct request *r)
{
	struct slot *s = named(stream, r);
	if (!s)
		return;
	errno = ENOTTY;
	answer(stream, s->pty ? terminal_resize(s->out[0].fd, r->rows, r->cols) : -1, "cannot resize");
}

void proc_forget(uint32_t stream, const struct request *r)
{
	struct slot *s = named(stream, r);
	if (!s)
		return;
	if (s->state == RUNNING) {
		port_end(stream, END_FAILED, EBUSY, "the process is still running");
		return;
	}
	if (s->stream)
		port_end(s->stream, END_DETACHED, 0, NULL);
	slot_free(s);
	port_end(stream, END_EXITED, 0, NULL);
}

/* --- the end --- */

static void kill_group(struct slot *s, int signal)
{
	/* A builtin that was forked a moment ago may not lead a group yet; it is not reaped, so its pid is still its own. */
	if (s->pid && kill(-s->pid, signal) < 0 && errno == ESRCH)
		kill(s->pid, signal);
}

void proc_leave(struct slot *s)
{
	s->stream = 0;
	s->started_due = false;
	if (s->detach) {
		proc_absorb(s);
		return;
	}
	/* Killed before its pipes close, so that an unfinished stdin is never taken for a finished one. */
	kill_group(s, SIGKILL);
	s->dying = true;
	if (s->pid)
		slot_close(s);
	else
		slot_free(s);
}

void proc_keep(struct slot *s)
{
	/* A file operation would wait for the rest of its input for ever, and half of that must never be taken for the whole. */
	bool half = s->builtin && s->in.fd >= 0 && !s->in.eof;
	s->detach = s->detach || !half;
	proc_leave(s);
}

static void note_result(struct slot *s, int status)
{
	s->pid = 0;
	s->deadline = 0;
	if (s->timed_out) {
		s->state = TIMED_OUT;
		s->code = WIFSIGNALED(status) ? WTERMSIG(status) : SIGTERM;
	} else if (WIFSIGNALED(status)) {
		s->state = SIGNALED;
		s->code = WTERMSIG(status);
	} else {
		s->state = EXITED;
		s->code = WEXITSTATUS(status);
	}
}

void proc_reaped(pid_t pid, int status)
{
	struct slot *s = slot_of_pid(pid);
	if (!s)
		return;
	/* Whoever outlived a deadline with it, goes with it. */
	if (s->timed_out)
		kill(-pid, SIGKILL);
	note_result(s, status);
	if (s->dying) {
		slot_free(s);
		return;
	}
	for (int c = 0; c < 2; c++) {
		struct output *o = &s->out[c];
		int n = 0;
		if (o->fd < 0 || o->eof)
			continue;
		if (s->pty)
			n = TERMINAL_LEFT;
		else if (ioctl(o->fd, FIONREAD, &n) < 0)
			n = 0;
		o->left = (uint32_t)n;
		o->ready = n > 0;
		o->eof = n == 0;
	}
	/* While it is quiet, what is left stays in the pipe: whoever attaches reads it from there. */
	if (s->stream == 0 && !port_quiet)
		proc_absorb(s);
}

void proc_absorb(struct slot *s)
{
	static uint8_t chunk[KEPT_SIZE];
	for (int c = 0; c < 2; c++) {
		struct output *o = &s->out[c];
		while (o->fd >= 0 && !o->eof && o->ready) {
			size_t want = s->state != RUNNING && o->left < sizeof chunk ? o->left : sizeof chunk;
			ssize_t n = read(o->fd, chunk, want);
			if (n > 0)
				ring_push(&o->kept, slot_kept(s, c), KEPT_SIZE, chunk, (uint32_t)n);
			if (n > 0 && s->state != RUNNING)
				o->left -= (uint32_t)n;
			/* One turn each: a process that writes for ever must not hold the others up. */
			o->ready = n > 0 && s->state != RUNNING;
			bool again = n < 0 && (errno == EAGAIN || errno == EINTR);
			o->eof = (n <= 0 && !again) || (s->state != RUNNING && (again || o->left == 0));
		}
	}
	/* The result and what was kept is all that is still wanted. */
	if (s->state != RUNNING && (!s->out[0].exists || s->out[0].eof) && (!s->out[1].exists || s->out[1].eof))
		slot_close(s);
}

void proc_end_result(const struct slot *s, enum end_kind *kind, int *code)
{
	*kind = s->state == TIMED_OUT ? END_TIMEOUT : s->state == SIGNALED ? END_SIGNALED : END_EXITED;
	*code = s->code;
}

void proc_ended(struct slot *s)
{
	if (!s->detach) {
		slot_free(s);
		return;
	}
	s->stream = 0;
	slot_close(s);
}

/* --- deadlines --- */

static void overdue(struct slot *s, uint64_t now)
{
	s->timed_out = true;
	kill_group(s, s->kills++ == 0 ? SIGTERM : SIGKILL);
	s->deadline = now + KILL_AFTER_MS;
}

int proc_deadlines(void)
{
	uint64_t now = 0, next = UINT64_MAX;
	for (struct slot *s = slots; s < slots + slots_top; s++) {
		if (s->kind != PROCESS || s->deadline == 0)
			continue;
		if (now == 0)
			now = now_ms();
		if (s->deadline <= now)
			overdue(s, now);
		if (s->deadline < next)
			next = s->deadline;
	}
	if (next == UINT64_MAX)
		return -1;
	return next - now > 60000 ? 60000 : (int)(next - now) + 1;
}

void proc_kill_all(void)
{
	for (struct slot *s = slots; s < slots + slots_top; s++)
		if (s->kind == PROCESS)
			kill_group(s, SIGKILL);
}
