/* Guest programs that know what their memory, their files and their descriptors must hold, and say so to whoever connects to PORT of the loopback.
 *
 *   witness fill PORT SEED MIB DIR FILES   writes memory and files all the time; every page and file says what it must be
 *   witness hold PORT DIR                  holds what a copy of the machine must still have: files, timers, connections, a map
 *   witness draw PORT NUMBERS              draws random numbers, as fast as it can, into pages that can be found in a memory image
 *
 * An answer is one line, `ok …` or `bad …`. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, LINE = 256, BURST = 64, BIGGEST = 48 << 10, DIRECTORIES = 16, GENERATION = 37, PATIENCE = 60000, BREATH = 10 };

static char answer[LINE];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static bool bad(const char *format, ...)
{
	va_list list;
	va_start(list, format);
	int n = snprintf(answer, sizeof answer, "bad ");
	vsnprintf(answer + n, sizeof answer - (size_t)n, format, list);
	va_end(list);
	return false;
}

/* --- the port --- */

static int listen_at(int port)
{
	struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0 || bind(fd, (void *)&where, sizeof where) < 0 ||
	    listen(fd, 16) < 0)
		die("listen");
	return fd;
}

static int connect_to(int port)
{
	struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (void *)&where, sizeof where) < 0)
		die("connect");
	return fd;
}

/* A line from somebody who has connected: -1 when nobody is there, else the connection. */
static int asked(int listener, int wait_ms, char line[LINE])
{
	struct pollfd p = {.fd = listener, .events = POLLIN};
	if (poll(&p, 1, wait_ms) <= 0)
		return -1;
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	size_t n = 0;
	while (fd >= 0 && n < LINE - 1 && read(fd, line + n, 1) == 1 && line[n] != '\n')
		n++;
	line[n] = 0;
	return fd;
}

static void tell(int fd)
{
	dprintf(fd, "%s\n", answer);
	close(fd);
}

/* --- fill: every page and every file holds what follows from its number and its stamp --- */

static uint64_t seed;
static uint64_t *memory, *page_stamp, *file_stamp;
static size_t pages, files;
static char *directory;
static uint8_t expected[BIGGEST], found[BIGGEST];

static uint64_t mixed(uint64_t a, uint64_t b, uint64_t c)
{
	uint64_t x = a * 0x9e3779b97f4a7c15 ^ (b + 1) * 0xbf58476d1ce4e5b9 ^ (c + 1) * 0x94d049bb133111eb;
	x ^= x >> 31;
	return x ? x : 1;
}

static uint64_t next(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x;
}

static void write_page(size_t i, uint64_t stamp)
{
	uint64_t x = mixed(seed, i, stamp), *page = memory + i * WORDS;
	for (size_t w = 0; w < WORDS; w++)
		page[w] = next(&x);
	page_stamp[i] = stamp;
}

static bool check_page(size_t i)
{
	uint64_t x = mixed(seed, i, page_stamp[i]), *page = memory + i * WORDS;
	for (size_t w = 0; w < WORDS; w++)
		if (page[w] != next(&x))
			return bad("page %zu of stamp %#llx differs at word %zu", i, (unsigned long long)page_stamp[i], w);
	return true;
}

static size_t file_content(size_t k, uint64_t stamp, uint8_t *to)
{
	uint64_t x = mixed(seed ^ 0xf11e, k, stamp);
	size_t size = next(&x) % (BIGGEST - 8);
	for (size_t at = 0; at < size; at += 8) {
		uint64_t word = next(&x);
		memcpy(to + at, &word, size - at < 8 ? size - at : 8);
	}
	return size;
}

static void file_path(size_t k, char path[LINE])
{
	snprintf(path, LINE, "%s/%zu/%zu", directory, k % DIRECTORIES, k);
}

/* By a rename, as careful programs do; some are synced and some are left to the page cache, so that both ways are seen. */
static void write_file(size_t k, uint64_t stamp)
{
	char path[LINE], aside[LINE + 8];
	size_t size = file_content(k, stamp, expected);
	file_path(k, path);
	snprintf(aside, sizeof aside, "%s.new", path);
	int fd = open(aside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, expected, size) != (ssize_t)size || (k % 8 == 0 && fsync(fd) < 0) || close(fd) < 0 || rename(aside, path) < 0)
		die(path);
	file_stamp[k] = stamp;
}

static bool check_file(size_t k)
{
	char path[LINE];
	size_t size = file_content(k, file_stamp[k], expected);
	file_path(k, path);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return bad("%s: %s", path, strerror(errno));
	ssize_t n = read(fd, found, BIGGEST);
	close(fd);
	if (n != (ssize_t)size || memcmp(found, expected, size) != 0)
		return bad("%s of stamp %#llx is not what was written (%zd bytes, of %zu)", path, (unsigned long long)file_stamp[k], n, size);
	return true;
}

static bool check_all(uint64_t stamp)
{
	for (size_t i = 0; i < pages; i++)
		if (!check_page(i))
			return false;
	for (size_t k = 0; k < files; k++)
		if (!check_file(k))
			return false;
	snprintf(answer, sizeof answer, "ok stamp %llu pages %zu files %zu", (unsigned long long)stamp, pages, files);
	return true;
}

/* `check`; `salt N`: from now on everything is stamped otherwise; `rest` and `go`: write nothing, go on. */
static bool fill_asked(int fd, const char *line, uint64_t *stamp, bool resting)
{
	if (strncmp(line, "salt ", 5) == 0)
		*stamp = strtoull(line + 5, NULL, 10) << 32;
	resting = strcmp(line, "rest") == 0 || (resting && strcmp(line, "go") != 0);
	if (strcmp(line, "check") != 0)
		snprintf(answer, sizeof answer, "ok stamp %llu", (unsigned long long)*stamp);
	else
		check_all(*stamp);
	tell(fd);
	return resting;
}

static void fill(char **argv)
{
	char path[LINE], line[LINE];
	int listener = listen_at(atoi(argv[0]));
	seed = strtoull(argv[1], NULL, 10);
	pages = (size_t)atoi(argv[2]) * 256; /* a power of two, so that an odd step meets each of them */
	directory = argv[3];
	files = (size_t)atoi(argv[4]);
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	page_stamp = calloc(pages, sizeof *page_stamp);
	file_stamp = calloc(files, sizeof *file_stamp);
	if (memory == MAP_FAILED || !page_stamp || !file_stamp)
		die("memory");
	mkdir(directory, 0755);
	for (int i = 0; i < DIRECTORIES; i++) {
		snprintf(path, sizeof path, "%s/%d", directory, i);
		mkdir(path, 0755);
	}
	for (size_t i = 0; i < pages; i++)
		write_page(i, 0);
	for (size_t k = 0; k < files; k++)
		write_file(k, 0);
	size_t at = 0, file = 0;
	uint64_t stamp = 1;
	for (bool resting = false;;) {
		int fd = asked(listener, resting ? -1 : BREATH, line);
		if (fd >= 0)
			resting = fill_asked(fd, line, &stamp, resting);
		for (size_t i = 0; i < BURST && !resting; i++, at += 509)
			write_page(at % pages, stamp);
		if (!resting) {
			write_file(file % files, stamp);
			file += 7;
			stamp++;
		}
	}
}

/* --- hold --- */

static struct {
	int open_file, deleted_file, on_tmpfs, ticks, alarm, connection, pipe_in, pipe_out, watch;
	uint64_t ticked, said;
	const char *generation;
	char first[GENERATION + 1];
	unsigned changes;
} held;

static const char content[] = "what was written before the machine was copied\n";

static int file_with_content(const char *format, const char *where)
{
	char path[LINE];
	snprintf(path, sizeof path, format, where);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, content, sizeof content) != sizeof content || lseek(fd, 10, SEEK_SET) != 10)
		die(path);
	return fd;
}

static bool same_content(int fd, const char *what, nlink_t links)
{
	char buffer[sizeof content];
	struct stat st;
	if (pread(fd, buffer, sizeof buffer, 0) != sizeof buffer || memcmp(buffer, content, sizeof content) != 0)
		return bad("%s has lost its content", what);
	if (lseek(fd, 0, SEEK_CUR) != 10)
		return bad("%s has lost its position", what);
	if (fstat(fd, &st) < 0 || st.st_nlink != links)
		return bad("%s has %lu links", what, (unsigned long)st.st_nlink);
	return true;
}

static int timer(time_t first_ms, time_t interval_ms)
{
	struct itimerspec when = {
	        .it_value = {first_ms / 1000, first_ms % 1000 * 1000000L}, .it_interval = {interval_ms / 1000, interval_ms % 1000 * 1000000L}};
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	if (fd < 0 || timerfd_settime(fd, 0, &when, NULL) < 0)
		die("timer");
	return fd;
}

/* The other end of the connection counts what it is told, and says how far it is: both ends must remember. */
static void count(int fd)
{
	uint64_t told, counted = 0;
	while (read(fd, &told, sizeof told) == sizeof told) {
		if (told != ++counted)
			counted = UINT64_MAX;
		if (write(fd, &counted, sizeof counted) != sizeof counted)
			break;
	}
	_exit(0);
}

static void connect_to_a_child(int port)
{
	int ends[2], listener = listen_at(port);
	held.connection = connect_to(port);
	int fd = accept(listener, NULL, NULL);
	if (fd < 0 || pipe(ends) < 0)
		die("connection");
	held.pipe_in = ends[1];
	held.pipe_out = ends[0];
	if (write(held.pipe_in, content, sizeof content) != sizeof content)
		die("pipe");
	switch (fork()) {
	case -1:
		die("fork");
		break;
	case 0:
		count(fd);
		break;
	default:
		close(fd);
		close(listener);
	}
}

/* Nothing waits for ever: who asks is to be told what is missing. */
static bool get(int fd, void *to, size_t size)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};
	return poll(&p, 1, PATIENCE) == 1 && read(fd, to, size) == (ssize_t)size;
}

static bool check_timers(void)
{
	uint64_t n;
	for (int i = 0; i < 2; i++) { /* once it may have ticked before */
		if (!get(held.ticks, &n, sizeof n))
			return bad("the periodic timer ticked %llu times and not again", (unsigned long long)held.ticked);
		held.ticked += n;
	}
	if (!get(held.alarm, &n, sizeof n))
		return bad("the single timer did not go off");
	close(held.alarm);
	held.alarm = timer(1500, 0); /* the next copy must see it go off */
	return true;
}

static bool check_connection(void)
{
	uint64_t counted = 0;
	held.said++;
	if (write(held.connection, &held.said, sizeof held.said) != sizeof held.said || !get(held.connection, &counted, sizeof counted))
		return bad("the connection is broken: %s", strerror(errno));
	if (counted != held.said)
		return bad("the other end counted %llu, not %llu", (unsigned long long)counted, (unsigned long long)held.said);
	char buffer[sizeof content];
	if (!get(held.pipe_out, buffer, sizeof buffer) || memcmp(buffer, content, sizeof content) != 0)
		return bad("the pipe has lost its content");
	if (write(held.pipe_in, content, sizeof content) != sizeof content)
		return bad("the pipe is broken");
	return true;
}

static void see_generation(void)
{
	char events[1024];
	ssize_t n;
	while ((n = read(held.watch, events, sizeof events)) > 0)
		for (ssize_t at = 0; at < n; held.changes++)
			at += (ssize_t)sizeof(struct inotify_event) + ((struct inotify_event *)(events + at))->len;
}

static bool check_held(void)
{
	see_generation();
	if (!same_content(held.open_file, "the open file", 1) || !same_content(held.deleted_file, "the deleted file", 0) ||
	    !same_content(held.on_tmpfs, "the file on tmpfs", 1) || !check_timers() || !check_connection())
		return false;
	snprintf(answer, sizeof answer, "ok pid %d said %llu changes %u first %.36s generation %.36s", getpid(),
	         (unsigned long long)held.said, held.changes, held.first, held.generation);
	return true;
}

static void hold(char **argv)
{
	char line[LINE], path[LINE];
	int fd = open("/run/ramet/generation", O_RDONLY | O_CLOEXEC);
	held.open_file = file_with_content("%s/open", argv[1]);
	held.deleted_file = file_with_content("%s/deleted", argv[1]);
	held.on_tmpfs = file_with_content("%s/held", "/dev/shm");
	snprintf(path, sizeof path, "%s/deleted", argv[1]);
	held.ticks = timer(50, 50);
	held.alarm = timer(1500, 0);
	held.watch = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	held.generation = fd < 0 ? MAP_FAILED : mmap(NULL, GENERATION, PROT_READ, MAP_SHARED, fd, 0);
	if (unlink(path) < 0 || held.generation == MAP_FAILED || inotify_add_watch(held.watch, "/run/ramet/generation", IN_MODIFY) < 0)
		die("hold");
	memcpy(held.first, held.generation, GENERATION);
	connect_to_a_child(atoi(argv[0]) + 100);
	int listener = listen_at(atoi(argv[0]));
	for (;;) {
		fd = asked(listener, -1, line);
		check_held();
		tell(fd);
	}
}

/* --- draw --- */

/* At the begin of each page; written at run time, so that it is nowhere else at the begin of one. */
static const char draw_mark[] = "ramet-witness-dr";
enum { HEAD = 3, NUMBERS = WORDS - HEAD };

static void draw(char **argv)
{
	char line[LINE];
	int listener = listen_at(atoi(argv[0]));
	size_t wanted = (size_t)atoi(argv[1]), count = (wanted + NUMBERS - 1) / NUMBERS;
	uint64_t *drawn = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (drawn == MAP_FAILED)
		die("memory");
	for (size_t page = 0; page < count; page++) {
		memcpy(drawn + page * WORDS, draw_mark, 16);
		drawn[page * WORDS + 2] = page;
	}
	size_t at = 0;
	for (int fd;;) {
		for (size_t i = 0; i < 1024 && at < wanted; i++, at++)
			if (getrandom(drawn + at / NUMBERS * WORDS + HEAD + at % NUMBERS, 8, 0) != 8)
				die("getrandom");
		if ((fd = asked(listener, at < wanted ? 0 : -1, line)) < 0)
			continue;
		/* `dump FROM COUNT`: one number a line; else how many there are */
		size_t from = 0, many = 0;
		FILE *out = fdopen(fd, "w");
		if (sscanf(line, "dump %zu %zu", &from, &many) == 2)
			for (size_t i = from; i < at && i < from + many; i++)
				fprintf(out, "%016llx\n", (unsigned long long)drawn[i / NUMBERS * WORDS + HEAD + i % NUMBERS]);
		else
			fprintf(out, "ok drawn %zu\n", at);
		fclose(out);
	}
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if (argc == 7 && strcmp(argv[1], "fill") == 0)
		fill(argv + 2);
	else if (argc == 4 && strcmp(argv[1], "hold") == 0)
		hold(argv + 2);
	else if (argc == 4 && strcmp(argv[1], "draw") == 0)
		draw(argv + 2);
	fprintf(stderr, "usage: see the head of witness.c\n");
	return 2;
}
