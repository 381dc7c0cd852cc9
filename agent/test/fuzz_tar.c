/* Any bytes as an archive: nothing may be made or changed outside of the directory that it is unpacked into. Checksums are repaired, or no input
 * would ever get past them. */
#include <assert.h>
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "../tar.h"
#include "../tarhead.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char top[64];
enum { INPUT_MOST = 64 * 1024, SUM_AT = 148, SUM_SIZE = 8, SIZE_AT = 124 };

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *f)
{
	(void)st;
	(void)type;
	return f->level == 0 ? 0 : remove(path);
}

static void empty(const char *path)
{
	nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static void prepare(void)
{
	snprintf(top, sizeof top, "%s/ramet-fuzz-tar-%d", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", (int)getpid());
	mkdir(top, 0755);
	assert(chdir(top) == 0);
	umask(022);
	mkdir("in", 0755);
	mkdir("out", 0755);
	FILE *f = fopen("out/canary", "w");
	assert(f);
	fputs("canary", f);
	fclose(f);
	chmod("out/canary", 0600);
}

static void check_outside(void)
{
	struct stat st;
	char text[16] = "";
	int entries = 0;
	assert(stat("out", &st) == 0 && (st.st_mode & 07777) == 0755 && st.st_uid == geteuid());
	assert(stat("out/canary", &st) == 0 && st.st_size == 6 && (st.st_mode & 07777) == 0600 && st.st_nlink == 1 && st.st_uid == geteuid());
	int fd = open("out/canary", O_RDONLY);
	assert(read(fd, text, sizeof text) == 6 && strcmp(text, "canary") == 0);
	close(fd);
	static const char *const dirs[] = {"out", "."};
	for (int i = 0; i < 2; i++) {
		DIR *d = opendir(dirs[i]);
		while (readdir(d))
			entries++;
		closedir(d);
	}
	assert(entries == 3 + 4);
}

/* Walks the members as the unpacker would, and makes each header's sum right. */
static void repair(uint8_t *p, size_t size)
{
	for (size_t at = 0; at + TAR_BLOCK <= size;) {
		unsigned sum = 0;
		char digits[16] = "";
		memset(p + at + SUM_AT, ' ', SUM_SIZE);
		for (size_t i = 0; i < TAR_BLOCK; i++)
			sum += p[at + i];
		snprintf(digits, sizeof digits, "%06o", sum & 0777777);
		memcpy(p + at + SUM_AT, digits, 7);
		memcpy(digits, p + at + SIZE_AT, 12);
		digits[12] = 0;
		size_t length = strtoul(digits, NULL, 8);
		at += TAR_BLOCK + (length < size ? (length + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK : 0);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t copy[INPUT_MOST];
	struct tar_failure f;
	if (!top[0])
		prepare();
	if (size < 1 || size > INPUT_MOST)
		return 0;
	bool owners = data[0] & 1;
	size--;
	memcpy(copy, data + 1, size);
	repair(copy, size);
	int in = memfd_create("archive", MFD_CLOEXEC), root = open("in", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	assert(in >= 0 && root >= 0 && write(in, copy, size) == (ssize_t)size);
	lseek(in, 0, SEEK_SET);
	/* Something that is there before, and points out. */
	assert(symlink("../out", "in/way") == 0);
	tar_unpack(in, root, owners, false, &f);
	close(in);
	close(root);
	check_outside();
	chmod("in", 0755);
	empty("in");
	return 0;
}
