#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "builtin.h"
#include "exec.h"
#include "reclaim.h"
#include "user.h"

enum { CHILD_STACK = 16 * 1024, PATH_SIZE = 4096, AGENT_NICE = -20 };

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/* What the child that borrows our memory is told, and what it answers. */
struct task {
	const struct launch *launch;
	const struct user *user;
	const char *path;
	enum { SETUP, CWD, EXECUTE } stage;
	volatile int error;
};

/* -1 as PID 1, which the out-of-memory killer leaves alone anyway. */
static int oom_fd = -1;
static bool boosted;

void exec_begin(bool first_process)
{
	/* In a guest full of busy processes the agent must still come to its turn. */
	boosted = setpriority(PRIO_PROCESS, 0, AGENT_NICE) == 0;
	if (first_process)
		return;
	oom_fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (oom_fd >= 0)
		(void)!pwrite(oom_fd, "-1000", 5, 0);
}

/* A child takes its score from its parent, and one write here is much cheaper than opening the child's own file there. */
static void oom_exempt(bool exempt)
{
	if (oom_fd >= 0)
		(void)!pwrite(oom_fd, exempt ? "-1000" : "0", exempt ? 5 : 1, 0);
}

/* --- in the child, which has our memory: raw system calls, because the C library's versions would act on the parent's threads --- */

static int become(const struct user *u)
{
	/* The agent is root without further groups, so root is nearly always there already. */
	if (u->uid == 0 && u->gid == 0 && u->groups_count == 0)
		return 0;
	gid_t groups[GROUPS_MAX + 1];
	memcpy(groups, u->groups, sizeof u->groups);
	int n = u->groups_count;
	groups[n++] = u->gid;
	if (syscall(SYS_setgroups, n, groups) < 0 || syscall(SYS_setresgid, u->gid, u->gid, u->gid) < 0)
		return -1;
	return (int)syscall(SYS_setresuid, u->uid, u->uid, u->uid);
}

static int set_up(struct task *t)
{
	const struct launch *l = t->launch;
	static const uint64_t no_signals;
	t->stage = SETUP;
	setsid();
	for (int i = 0; i < 3; i++)
		if (dup2(l->fd[i], i) < 0)
			return -1;
	if (l->pty && ioctl(0, TIOCSCTTY, 0) < 0)
		return -1;
	if (become(t->user) < 0)
		return -1;
	t->stage = CWD;
	const char *cwd = l->request->cwd;
	if (cwd) {
		if (chdir(cwd) < 0)
			return -1;
	} else if (chdir(t->user->home) < 0) {
		if (chdir("/") < 0)
			return -1;
	}
	t->stage = EXECUTE;
	/* Every signal is blocked in the agent and none has a handler: with the mask open the child is as good as new. */
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &no_signals, NULL, sizeof no_signals);
	return 0;
}

static int execute_in_path(struct task *t)
{
	char **argv = t->launch->request->argv, **envp = t->launch->request->envp;
	char full[PATH_SIZE];
	size_t name = strlen(argv[0]);
	int error = ENOENT;
	for (const char *dir = t->path;; dir++) {
		size_t n = strcspn(dir, ":");
		if (n + 1 + name < sizeof full && name > 0) {
			memcpy(full, dir, n);
			full[n] = '/';
			memcpy(full + n + (n > 0), argv[0], name + 1); /* an empty element is the working directory */
			/* A failing execve() costs many times what this does. */
			if (access(full, X_OK) == 0) {
				struct stat st;
				execve(full, argv, envp);
				if (!(errno == EACCES && stat(full, &st) == 0 && S_ISDIR(st.st_mode))) {
					error = errno;
					if (error != EACCES)
						return error;
				}
			} else if (errno == EACCES) {
				error = EACCES;
			}
		}
		dir += n;
		if (!*dir)
			return error;
	}
}

static int child(void *arg)
{
	struct task *t = arg;
	char **argv = t->launch->request->argv;
	if (set_up(t) < 0) {
		t->error = errno;
	} else if (strchr(argv[0], '/')) {
		execve(argv[0], argv, t->launch->request->envp);
		t->error = errno;
	} else {
		t->error = execute_in_path(t);
	}
	_exit(127);
}

/* --- in the agent --- */

static char text[4][USER_TEXT_MAX + 16];

static const char *value_of(const struct request *r, const char *name)
{
	size_t n = strlen(name);
	for (int i = 0; i < r->envc; i++)
		if (strncmp(r->envp[i], name, n) == 0 && r->envp[i][n] == '=')
			return r->envp[i] + n + 1;
	return NULL;
}

/* What was given wins over the defaults. Returns the PATH to search. */
static const char *complete_environment(struct request *r, const struct user *u, bool pty)
{
	static char path_entry[sizeof default_path + 8], term_entry[] = "TERM=xterm-256color";
	const char *path = value_of(r, "PATH");
	const struct { const char *name, *value; } of_user[] = {{"HOME", u->home}, {"USER", u->name}, {"SHELL", u->shell}};
	int n = r->envc;
	if (!path) {
		snprintf(path_entry, sizeof path_entry, "PATH=%s", default_path);
		r->envp[n++] = path_entry;
	}
	for (int i = 0; i < 3; i++) {
		if (!*of_user[i].value || value_of(r, of_user[i].name))
			continue;
		snprintf(text[i], sizeof text[i], "%s=%s", of_user[i].name, of_user[i].value);
		r->envp[n++] = text[i];
	}
	if (pty && !value_of(r, "TERM"))
		r->envp[n++] = term_entry;
	r->envp[n] = NULL;
	r->envc = n;
	return path ? path : default_path;
}

static void explain(const struct task *t, char *message, size_t size)
{
	const struct request *r = t->launch->request;
	const char *program = r->argv[0];
	struct stat st;
	if (t->stage == SETUP)
		snprintf(message, size, "cannot prepare the process: %s", strerror(t->error));
	else if (t->stage == CWD && t->error == ENOENT)
		snprintf(message, size, "no such directory: %s", r->cwd ? r->cwd : "/");
	else if (t->stage == CWD)
		snprintf(message, size, "%s: %s", strerror(t->error), r->cwd ? r->cwd : "/");
	else if (t->error == ENOENT && (!strchr(program, '/') || stat(program, &st) < 0))
		snprintf(message, size, "no such program: %s", program);
	else if (t->error == ENOENT)
		snprintf(message, size, "no such interpreter, which is needed by: %s", program);
	else if (t->error == ENOEXEC)
		snprintf(message, size, "not a program: %s", program);
	else
		snprintf(message, size, "%s: %s", strerror(t->error), program);
}

static pid_t launch_program(struct task *t, char *message, size_t size)
{
	static char stack[CHILD_STACK] __attribute__((aligned(16)));
	pid_t pid = clone(child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, t);
	if (pid < 0) {
		int error = errno;
		snprintf(message, size, "cannot start a process: %s", strerror(error));
		errno = error;
	} else if (t->error) {
		/* main.c reaps the rest of it, like any orphan. */
		explain(t, message, size);
		errno = t->error;
		return -1;
	}
	return pid;
}

static pid_t launch_builtin(struct task *t, char *message, size_t size)
{
	pid_t pid = fork();
	if (pid < 0) {
		int error = errno;
		snprintf(message, size, "cannot start a process: %s", strerror(error));
		errno = error;
		return -1;
	}
	if (pid > 0)
		return pid;
	if (set_up(t) < 0) {
		dprintf(2, "%d %s: %s\n", errno, strerror(errno), t->launch->request->cwd ? t->launch->request->cwd : "/");
		_exit(1);
	}
	reclaim_close_others();
	_exit(builtin_run(t->launch->request->argc, t->launch->request->argv));
}

pid_t exec_launch(const struct launch *l, char *message, size_t size)
{
	struct request *r = (struct request *)l->request;
	bool builtin = r->flags & OPEN_BUILTIN;
	if (r->argc == 0) {
		snprintf(message, size, "no program was named");
		errno = EINVAL;
		return -1;
	}
	if (builtin && !builtin_exists(r->argv[0])) {
		snprintf(message, size, "no such builtin: %s", r->argv[0]);
		errno = EPROTO;
		return -1;
	}
	struct task t = {.launch = l, .user = user_find(r->user, message, size)};
	if (!t.user) {
		errno = ENOENT;
		return -1;
	}
	t.path = complete_environment(r, t.user, l->pty);
	/* A user's terminal is the user's, so that it can be opened by its name. */
	if (l->pty && t.user->uid != 0)
		(void)!fchown(l->fd[0], t.user->uid, (gid_t)-1);
	oom_exempt(false);
	pid_t pid = builtin ? launch_builtin(&t, message, size) : launch_program(&t, message, size);
	int error = errno;
	/* Only now: the agent sleeps until the child has executed its program, so until then the child needs the agent's priority too. Its group, in
	 * case it has forked already. */
	if (pid > 0 && boosted)
		setpriority(builtin ? PRIO_PROCESS : PRIO_PGRP, (id_t)pid, 0);
	oom_exempt(true);
	errno = error;
	return pid;
}
