#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include "metrics.h"
#include "port.h"

enum { FILE_MAX = 4096, ANSWER_MAX = 2048, MS_PER_TICK = 10, PAGE = 4096 };

static int proc = -1, sys = -1;
static char answer[ANSWER_MAX];
static size_t length;

void metrics_begin(int proc_fd, int sys_fd)
{
	sys = sys_fd;
	proc = proc_fd;
}

static void say(const char *name, unsigned long long value)
{
	length += (size_t)snprintf(answer + length, sizeof answer - length, "%s %llu\n", name, value);
}

/* The start of a file; empty when there is none. */
static const char *contents_in(int directory, const char *path)
{
	static char buf[FILE_MAX];
	ssize_t n = 0;
	int fd = openat(directory, path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, buf, sizeof buf - 1);
		close(fd);
	}
	buf[n > 0 ? n : 0] = 0;
	return buf;
}

static const char *contents(const char *path)
{
	return contents_in(proc, path);
}

static void load_and_uptime(void)
{
	unsigned processes = 0;
	char load[32] = "";
	say("uptime_ms", (unsigned long long)(strtod(contents("uptime"), NULL) * 1000));
	if (sscanf(contents("loadavg"), "%31s %*s %*s %*u/%u", load, &processes) == 2)
		length += (size_t)snprintf(answer + length, sizeof answer - length, "load1 %s\n", load);
	say("processes", processes);
}

static void cpu(void)
{
	unsigned long long user, nice, system, idle, wait, irq, soft;
	if (sscanf(contents("stat"), "cpu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &wait, &irq, &soft) != 7)
		return;
	say("cpu_user_ms", (user + nice) * MS_PER_TICK);
	say("cpu_system_ms", (system + irq + soft) * MS_PER_TICK);
	say("cpu_idle_ms", (idle + wait) * MS_PER_TICK);
}

/* The number behind `name` at the start of a line. */
static bool field(const char *text, const char *name, unsigned long long *value)
{
	size_t n = strlen(name);
	for (const char *p = text; p && *p; p = (p = strchr(p, '\n')) ? p + 1 : NULL) {
		if (strncmp(p, name, n) != 0)
			continue;
		*value = strtoull(p + n, NULL, 10);
		return true;
	}
	return false;
}

static void memory(void)
{
	unsigned long long value;
	static const struct { const char *field, *name; } wanted[] = {
		{"MemTotal:", "mem_total"}, {"MemFree:", "mem_free"}, {"MemAvailable:", "mem_available"},
		{"Cached:", "mem_cached"}, {"AnonPages:", "mem_anon"},
	};
	const char *text = contents("meminfo");
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
		if (field(text, wanted[i].field, &value))
			say(wanted[i].name, value * 1024);
	/* What is of files, evictable, and needs no writing first. */
	unsigned long long files = 0, unwritten = 0;
	static const char *const parts[] = {"Active(file):", "Inactive(file):", "Dirty:", "Writeback:"};
	for (int i = 0; i < 4; i++)
		if (field(text, parts[i], &value))
			*(i < 2 ? &files : &unwritten) += value * 1024;
	say("mem_reclaimable", files > unwritten ? files - unwritten : 0);
	if (field(contents("vmstat"), "workingset_refault_file", &value))
		say("mem_refaulted", value * PAGE);
	if (field(contents_in(sys, "module/damon_reclaim/parameters/bytes_reclaimed_regions"), "", &value))
		say("damon_reclaimed", value);
}

static void pressure(const char *path, const char *name)
{
	const char *total = strstr(contents(path), "total=");
	if (total)
		say(name, strtoull(total + 6, NULL, 10));
}

static void disk(void)
{
	struct statvfs fs;
	if (statvfs("/", &fs) < 0)
		return;
	say("disk_total", (unsigned long long)fs.f_blocks * fs.f_frsize);
	say("disk_free", (unsigned long long)fs.f_bavail * fs.f_frsize);
}

void metrics_answer(uint32_t stream)
{
	length = 0;
	load_and_uptime();
	cpu();
	memory();
	pressure("pressure/memory", "psi_mem_some_us");
	pressure("pressure/cpu", "psi_cpu_some_us");
	pressure("pressure/io", "psi_io_some_us");
	disk();
	port_frame(T_DATA, 1, stream, answer, (uint32_t)length);
	port_frame(T_EOF, 1, stream, NULL, 0);
	port_end(stream, END_EXITED, 0, NULL);
}
