/* Trees through tar_pack and tar_unpack, and archives that must be refused. Run as root it also tries owners and devices. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>
#include "../tar.h"
#include "../tarhead.h"
#include "check.h"

static char top[] = "/tmp/ramet-test-tar-XXXXXX";

static int shell(const char *command)
{
	int status = system(command);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int open_tree(const char *name)
{
	mkdir(name, 0755);
	return open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* Packs `from` with our packer and unpacks it into `to` with our unpacker. */
static int through(const char *from, const char *to, int owners)
{
	int p[2], root = open_tree(to), status;
	struct tar_failure f = {0};
	if (pipe(p) < 0)
		return 0;
	pid_t pid = fork();
	if (pid == 0)
		_exit(tar_pack(p[1], from) != 0);
	close(p[1]);
	int good = tar_unpack(p[0], root, owners, 1, &f);
	close(p[0]);
	close(root);
	waitpid(pid, &status, 0);
	if (!good)
		fprintf(stderr, "%d %s: %s\n", f.error, f.message, f.path);
	return good && status == 0;
}

static void make_tree(void)
{
	CHECK(shell("mkdir -p a/dir/sub a/empty && echo hello > a/file && ln -s ../anywhere a/link && ln a/file a/dir/hard && mkfifo a/fifo && "
		    "head -c 1000000 /dev/urandom > a/dir/sub/big && : > a/nothing && head -c 512 /dev/zero > a/block && "
		    "chmod 4711 a/block && chmod 500 a/empty && touch -d '2001-02-03 04:05:06' a/file && touch -d 1960-01-01 a/nothing") == 0);
	CHECK(shell("n=$(printf '%0200d' 0); mkdir -p a/$n/$n && echo deep > a/$n/$n/$n && ln -s $n/$n/$n a/long && ln a/$n/$n/$n a/hard2") == 0);
	CHECK(shell("cd a && d=dir; for i in 1 2 3 4 5 6 7 8 9; do d=$d/$(printf '%0240d' $i); mkdir $d; done; echo x > $d/x") == 0);
	if (geteuid() == 0) {
		CHECK(mknod("a/null", S_IFCHR | 0666, makedev(1, 3)) == 0);
		CHECK(chown("a/file", 12345, 3000000) == 0);
	}
	CHECK(shell("touch -d '2002-02-02' a/dir a/empty a") == 0);
}

static const char listing[] = "cd %s && find . -printf '%%p %%y %%m %%n %%l %%Ts%s ' -type f -printf %%s -o -printf '\\n' | sort > ../%s.list";

static void list_tree(const char *name, const char *owners)
{
	char command[512];
	snprintf(command, sizeof command, listing, name, owners, name);
	CHECK(shell(command) == 0);
}

static void test_round_trip(void)
{
	make_tree();
	CHECK(through("a", "b", geteuid() == 0));
	const char *owners = geteuid() == 0 ? " %%U %%G" : "";
	list_tree("a", owners);
	list_tree("b", owners);
	CHECK(shell("cmp a.list b.list") == 0);
	CHECK(shell("diff -r --no-dereference a/dir b/dir && cmp a/file b/file") == 0);
	CHECK(shell("test $(stat -c %h b/file) = 2 && test $(stat -c %i b/file) = $(stat -c %i b/dir/hard)") == 0);
}

static void test_without_owners(void)
{
	struct stat st;
	CHECK(through("a", "c", 0));
	CHECK(stat("c/file", &st) == 0 && st.st_uid == geteuid());
	CHECK(stat("c/block", &st) == 0 && (st.st_mode & 07777) == 0711);
}

static void test_other_tars(void)
{
	CHECK(shell("rm -f a/fifo a/null") == 0);
	for (int i = 0; i < 2; i++) {
		char command[256];
		struct tar_failure f;
		snprintf(command, sizeof command, "tar --format=%s -C a -cf in.tar .", i ? "gnu" : "pax");
		CHECK(shell(command) == 0);
		int in = open("in.tar", O_RDONLY), root = open_tree(i ? "gnu" : "pax");
		CHECK(tar_unpack(in, root, 0, 1, &f));
		close(in);
		close(root);
		CHECK(shell(i ? "diff -r --no-dereference a gnu" : "diff -r --no-dereference a pax") == 0);
	}
	int out = open("out.tar", O_WRONLY | O_CREAT | O_TRUNC, 0600);
	CHECK(tar_pack(out, "a") == 0);
	close(out);
	CHECK(shell("mkdir theirs && tar -C theirs -xf out.tar && diff -r --no-dereference a theirs") == 0);
	CHECK(shell("python3 -c 'import tarfile; tarfile.open(\"out.tar\").getmembers()'") == 0);
	out = open("one.tar", O_WRONLY | O_CREAT | O_TRUNC, 0600);
	CHECK(tar_pack(out, "a/file") == 0);
	close(out);
	CHECK(shell("test \"$(tar -tf one.tar)\" = file") == 0);
}

/* --- archives of one or two members, made by hand --- */

static uint8_t archive[256 * 1024];
static size_t size;

static void member(char type, const char *name, const char *link, const char *contents)
{
	static struct tar_entry e;
	memset(&e, 0, sizeof e);
	e.type = type;
	e.mode = 0644;
	e.size = (int64_t)strlen(contents);
	strcpy(e.name, name);
	strcpy(e.link, link);
	size += tar_encode(&e, archive + size);
	memcpy(archive + size, contents, strlen(contents));
	size += (strlen(contents) + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK;
}

static int unpack_made(struct tar_failure *f)
{
	memset(f, 0, sizeof *f);
	int fd = open("made.tar", O_RDWR | O_CREAT | O_TRUNC, 0600), root = open_tree("made");
	memset(archive + size, 0, (size_t)2 * TAR_BLOCK);
	CHECK(write(fd, archive, size + (size_t)2 * TAR_BLOCK) == (ssize_t)size + 2 * TAR_BLOCK);
	lseek(fd, 0, SEEK_SET);
	int good = tar_unpack(fd, root, 0, 0, f);
	close(fd);
	close(root);
	memset(archive, 0, sizeof archive);
	size = 0;
	return good;
}

static void test_refused(void)
{
	struct tar_failure f;
	CHECK(shell("mkdir outside && echo kept > outside/victim") == 0);
	static const char *const names[] = {"/etc/evil", "../evil", "a/../../evil", "..", "a/.."};
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		member('0', names[i], "", "x");
		CHECK(!unpack_made(&f) && f.error == EPERM);
	}
	member('2', "out", "../outside", "");
	member('0', "out/victim", "", "gone");
	CHECK(!unpack_made(&f) && f.error == ENOTDIR);
	member('2', "victim", "../outside/victim", "");
	member('0', "victim", "", "gone");
	CHECK(unpack_made(&f)); /* replaces the link */
	member('1', "hard", "../outside/victim", "");
	CHECK(!unpack_made(&f) && f.error == EPERM);
	member('2', "out2", "../outside", "");
	member('1', "hard", "out2/victim", "");
	CHECK(!unpack_made(&f) && f.error == ENOTDIR);
	member('2', "dir", "../outside", "");
	member('5', "dir", "", "");
	member('0', "dir/victim", "", "x");
	CHECK(unpack_made(&f)); /* replaces the link by a directory */
	member('5', "dir", "", "");
	member('2', "dir", "../outside", "");
	CHECK(!unpack_made(&f)); /* but not a directory by a link */
	CHECK(shell("test \"$(cat outside/victim)\" = kept && test $(ls outside | wc -l) = 1 && test $(stat -c %h outside/victim) = 1") == 0);
	CHECK(shell("test ! -e evil && test ! -e /etc/evil") == 0);
}

static void test_damaged(void)
{
	struct tar_failure f;
	CHECK(unpack_made(&f)); /* empty */
	member('0', "x", "", "x");
	archive[5] ^= 1;
	CHECK(!unpack_made(&f) && f.error == EINVAL);
	int in = open("/dev/null", O_RDONLY), root = open_tree("made");
	CHECK(!tar_unpack(in, root, 0, 0, &f) && f.error == EPIPE);
	close(in);
	close(root);
	member('S', "sparse", "", "");
	CHECK(!unpack_made(&f) && f.error == EOPNOTSUPP);
}

int main(void)
{
	if (!mkdtemp(top) || chdir(top) < 0)
		return 1;
	umask(022);
	test_round_trip();
	test_without_owners();
	test_other_tars();
	test_refused();
	test_damaged();
	char command[128];
	snprintf(command, sizeof command, "chmod -R u+rwx %s; rm -rf %s", top, top);
	shell(command);
	return check_report();
}
