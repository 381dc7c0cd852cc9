/* The builtin that runs what an image wants done in each copy of a machine. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "builtin.h"
#include "hooks.h"

enum { PATH_SIZE = 512, VALUE_SIZE = 160, BY_SIGNAL = 128, LATE = 124 };

static char generation[VALUE_SIZE], name[VALUE_SIZE];
static char *environment[] = {
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", generation, name, NULL,
};

/* What is said when there is no time left while a hook runs. */
static char late[PATH_SIZE + 40];
static volatile sig_atomic_t is_late;

/* SIGTERM, which the whole group gets some seconds before SIGKILL: only now is it known which hook it was that hung. */
static void out_of_time(int signal)
{
	(void)signal;
	if (!is_late)
		(void)!write(2, late, strlen(late));
	is_late = 1;
}

/* Bytes, in every locale. */
static int by_name(const struct dirent **a, const struct dirent **b)
{
	return strcmp((*a)->d_name, (*b)->d_name);
}

static int run(const char *path)
{
	int status, error[2];
	char message[48];
	/* Closed by a program that starts; else it brings why not. */
	if (pipe2(error, O_CLOEXEC) < 0)
		return builtin_fail(path);
	snprintf(late, sizeof late, "%d did not end in time: %s\n", LATE, path);
	pid_t pid = fork();
	if (pid == 0) {
		execve(path, (char *[]){(char *)path, NULL}, environment);
		(void)!write(error[1], &errno, sizeof errno);
		_exit(127);
	}
	close(error[1]);
	if (pid < 0)
		return builtin_fail(path);
	int why = 0;
	ssize_t n = read(error[0], &why, sizeof why);
	close(error[0]);
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return builtin_fail(path);
	if (is_late)
		return 1;
	if (n == sizeof why)
		return builtin_fail_with(why, strerror(why), path);
	if (WIFSIGNALED(status)) {
		snprintf(message, sizeof message, "was killed by signal %d", WTERMSIG(status));
		return builtin_fail_with(BY_SIGNAL + WTERMSIG(status), message, path);
	}
	snprintf(message, sizeof message, "ended with status %d", WEXITSTATUS(status));
	return WEXITSTATUS(status) ? builtin_fail_with(WEXITSTATUS(status), message, path) : 0;
}

int hooks_run(const char *directory, const char *generation_text, const char *name_text)
{
	struct dirent **entries;
	snprintf(generation, sizeof generation, "RAMET_GENERATION=%s", generation_text);
	snprintf(name, sizeof name, "RAMET_NAME=%s", name_text);
	int n = scandir(directory, &entries, NULL, by_name);
	if (n < 0)
		return errno == ENOENT ? 0 : builtin_fail(directory);
	struct sigaction term = {.sa_handler = out_of_time, .sa_flags = SA_RESTART}, before;
	sigaction(SIGTERM, &term, &before);
	int result = 0;
	for (int i = 0; i < n; i++) {
		char path[PATH_SIZE];
		struct stat st;
		snprintf(path, sizeof path, "%s/%s", directory, entries[i]->d_name);
		if (result == 0 && stat(path, &st) == 0 && S_ISREG(st.st_mode) && (st.st_mode & 0111))
			result = run(path);
		free(entries[i]);
	}
	free(entries);
	sigaction(SIGTERM, &before, NULL);
	return result;
}

int builtin_hooks(char **argv)
{
	return hooks_run("/etc/ramet/fork.d", argv[1], argv[2]);
}
