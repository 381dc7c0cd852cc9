#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tarhead.h"

struct raw {
	char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], sum[8], type, link[100], magic[6], version[2], user[32], group[32], major[8],
		minor[8], prefix[155], pad[12];
};

enum { ID_MOST = 07777777 };
static const int64_t size_most = 077777777777;

/* --- encoding --- */

static void put_octal(char *p, size_t width, uint64_t v)
{
	for (size_t i = width - 1; i-- > 0; v >>= 3)
		p[i] = (char)('0' + (v & 7));
	p[width - 1] = 0;
}

static unsigned checksum(const uint8_t *p)
{
	const size_t at = offsetof(struct raw, sum);
	unsigned sum = 0;
	for (size_t i = 0; i < TAR_BLOCK; i++)
		sum += i >= at && i < at + 8 ? ' ' : p[i];
	return sum;
}

static void encode_block(uint8_t *out, const struct tar_entry *e, char type, const char *name, int64_t size)
{
	struct raw *r = (struct raw *)out;
	memset(r, 0, sizeof *r);
	/* Cut when too long: then a pax record has all of it. */
	memcpy(r->name, name, strnlen(name, sizeof r->name));
	memcpy(r->link, e->link, strnlen(e->link, sizeof r->link));
	put_octal(r->mode, sizeof r->mode, e->mode & 07777);
	put_octal(r->uid, sizeof r->uid, e->uid > ID_MOST ? 0 : e->uid);
	put_octal(r->gid, sizeof r->gid, e->gid > ID_MOST ? 0 : e->gid);
	put_octal(r->size, sizeof r->size, (uint64_t)(size > size_most ? 0 : size));
	put_octal(r->mtime, sizeof r->mtime, (uint64_t)(e->mtime < 0 || e->mtime > size_most ? 0 : e->mtime));
	put_octal(r->major, sizeof r->major, e->major);
	put_octal(r->minor, sizeof r->minor, e->minor);
	r->type = type;
	memcpy(r->magic, "ustar", 6);
	memcpy(r->version, "00", 2);
	put_octal(r->sum, 7, checksum(out));
	r->sum[7] = ' ';
}

/* "LENGTH key=value\n", where LENGTH counts its own digits too. */
static size_t put_record(char *p, const char *key, const char *value)
{
	size_t rest = strlen(key) + strlen(value) + 3, length = rest + 1;
	char digits[24];
	while ((size_t)snprintf(digits, sizeof digits, "%zu", length) + rest != length)
		length = rest + strlen(digits);
	return (size_t)sprintf(p, "%zu %s=%s\n", length, key, value);
}

static size_t put_number(char *p, const char *key, int64_t value)
{
	char text[24];
	snprintf(text, sizeof text, "%lld", (long long)value);
	return put_record(p, key, text);
}

static size_t put_extensions(const struct tar_entry *e, char *p)
{
	size_t n = 0;
	if (strlen(e->name) > sizeof ((struct raw *)0)->name)
		n += put_record(p + n, "path", e->name);
	if (strlen(e->link) > sizeof ((struct raw *)0)->link)
		n += put_record(p + n, "linkpath", e->link);
	if (e->size > size_most)
		n += put_number(p + n, "size", e->size);
	if (e->mtime < 0 || e->mtime > size_most)
		n += put_number(p + n, "mtime", e->mtime);
	if (e->uid > ID_MOST)
		n += put_number(p + n, "uid", e->uid);
	if (e->gid > ID_MOST)
		n += put_number(p + n, "gid", e->gid);
	return n;
}

size_t tar_encode(const struct tar_entry *e, uint8_t *out)
{
	size_t n = put_extensions(e, (char *)out + TAR_BLOCK), at = 0;
	if (n > 0) {
		static struct tar_entry extension = {.mode = 0644};
		encode_block(out, &extension, 'x', "pax", (int64_t)n);
		size_t padded = (n + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK;
		memset(out + TAR_BLOCK + n, 0, padded - n);
		at = TAR_BLOCK + padded;
	}
	encode_block(out + at, e, e->type, e->name, e->size);
	return at + TAR_BLOCK;
}

/* --- decoding --- */

/* Octal text, or GNU's binary for what is too large for that. */
static bool get_number(const char *p, size_t width, int64_t *value)
{
	const uint8_t *u = (const uint8_t *)p;
	uint64_t v = 0;
	size_t i = 0;
	if (u[0] & 0x80) {
		bool negative = u[0] & 0x40;
		v = negative ? ~(uint64_t)0x3f | (u[0] & 0x3f) : u[0] & 0x3f;
		for (i = 1; i < width; i++) {
			if (i + 8 < width && u[i] != (negative ? 0xff : 0))
				return false;
			v = v << 8 | u[i];
		}
		*value = (int64_t)v;
		return (*value < 0) == negative;
	}
	while (i < width && p[i] == ' ')
		i++;
	for (; i < width && p[i] >= '0' && p[i] <= '7'; i++)
		v = v << 3 | (uint64_t)(p[i] - '0');
	*value = (int64_t)v;
	return i == width || p[i] == 0 || p[i] == ' ';
}

static bool get_unsigned(const char *p, size_t width, unsigned *value)
{
	int64_t v;
	if (!get_number(p, width, &v) || v < 0 || v > UINT32_MAX)
		return false;
	*value = (unsigned)v;
	return true;
}

enum tar_result tar_decode(struct tar_entry *e, const uint8_t *block)
{
	const struct raw *r = (const struct raw *)block;
	static const uint8_t zero[TAR_BLOCK];
	int64_t sum;
	size_t n = 0;
	if (memcmp(block, zero, TAR_BLOCK) == 0)
		return TAR_END;
	if (!get_number(r->sum, sizeof r->sum, &sum) || (uint64_t)sum != checksum(block))
		return TAR_BAD;
	e->type = r->type ? r->type : '0';
	e->mtime_ns = 0;
	e->major = e->minor = 0;
	if (!get_unsigned(r->mode, sizeof r->mode, &e->mode) || !get_unsigned(r->uid, sizeof r->uid, &e->uid) ||
	    !get_unsigned(r->gid, sizeof r->gid, &e->gid) || !get_number(r->size, sizeof r->size, &e->size) || e->size < 0 ||
	    !get_number(r->mtime, sizeof r->mtime, &e->mtime))
		return TAR_BAD;
	if ((e->type == '3' || e->type == '4') &&
	    (!get_unsigned(r->major, sizeof r->major, &e->major) || !get_unsigned(r->minor, sizeof r->minor, &e->minor)))
		return TAR_BAD;
	/* GNU's own format ("ustar  ") uses the prefix for something else. */
	if (memcmp(r->magic, "ustar", 6) == 0 && r->prefix[0]) {
		n = strnlen(r->prefix, sizeof r->prefix);
		memcpy(e->name, r->prefix, n);
		e->name[n++] = '/';
	}
	size_t length = strnlen(r->name, sizeof r->name);
	memcpy(e->name + n, r->name, length);
	e->name[n + length] = 0;
	length = strnlen(r->link, sizeof r->link);
	memcpy(e->link, r->link, length);
	e->link[length] = 0;
	/* Before there was a type for directories, a slash at the end said it. */
	if (e->type == '0' && e->name[0] && e->name[strlen(e->name) - 1] == '/')
		e->type = '5';
	return TAR_OK;
}

static const char *set_name(char *to, bool *has, const char *value, size_t n)
{
	if (n >= TAR_NAME_MAX)
		return "a name is too long";
	if (memchr(value, 0, n))
		return "a name has a zero byte in it";
	memcpy(to, value, n);
	to[n] = 0;
	*has = true;
	return NULL;
}

/* A decimal number, perhaps with a fraction. */
static bool get_decimal(const char *p, size_t n, int64_t *whole, long *nanoseconds)
{
	char text[64], *end;
	if (n == 0 || n >= sizeof text)
		return false;
	memcpy(text, p, n);
	text[n] = 0;
	*whole = strtoll(text, &end, 10);
	long scale = 100000000, ns = 0;
	if (*end == '.')
		for (end++; *end >= '0' && *end <= '9'; end++, scale /= 10)
			ns += (*end - '0') * scale;
	if (ns && text[0] == '-') {
		*whole -= 1;
		ns = 1000000000 - ns;
	}
	*nanoseconds = ns;
	return *end == 0 && end > text;
}

static const char *set_record(struct tar_extension *x, const char *key, const char *value, size_t n)
{
	struct tar_entry *e = &x->entry;
	int64_t number = 0;
	long fraction = 0;
	if (strcmp(key, "path") == 0)
		return set_name(e->name, &x->has_name, value, n);
	if (strcmp(key, "linkpath") == 0)
		return set_name(e->link, &x->has_link, value, n);
	if (strncmp(key, "GNU.sparse.", 11) == 0)
		return "sparse members are not supported";
	bool size = strcmp(key, "size") == 0, mtime = strcmp(key, "mtime") == 0, uid = strcmp(key, "uid") == 0, gid = strcmp(key, "gid") == 0;
	if (!size && !mtime && !uid && !gid)
		return NULL;
	if (!get_decimal(value, n, &number, &fraction) || (!mtime && (number < 0 || fraction)) || ((uid || gid) && number > UINT32_MAX))
		return "a number that is none";
	if (size) {
		e->size = number;
		x->has_size = true;
	} else if (mtime) {
		e->mtime = number;
		e->mtime_ns = fraction;
		x->has_mtime = true;
	} else {
		*(uid ? &e->uid : &e->gid) = (unsigned)number;
		*(uid ? &x->has_uid : &x->has_gid) = true;
	}
	return NULL;
}

const char *tar_extend(struct tar_extension *x, const uint8_t *p, size_t n)
{
	static const char cut[] = "an extended header is damaged";
	while (n > 0) {
		size_t length = 0, i = 0;
		for (; i < n && i < 6 && p[i] >= '0' && p[i] <= '9'; i++)
			length = length * 10 + (size_t)(p[i] - '0');
		if (i == 0 || i == n || p[i] != ' ' || length > n || length < i + 3 || p[length - 1] != '\n')
			return cut;
		const uint8_t *key_start = p + i + 1, *equals = memchr(key_start, '=', length - i - 2);
		char key[64];
		if (!equals)
			return cut;
		size_t key_length = (size_t)(equals - key_start);
		if (key_length < sizeof key) { /* no key of interest is longer */
			memcpy(key, key_start, key_length);
			key[key_length] = 0;
			const char *wrong = set_record(x, key, (const char *)equals + 1, (size_t)(p + length - 1 - (equals + 1)));
			if (wrong)
				return wrong;
		}
		p += length;
		n -= length;
	}
	return NULL;
}

const char *tar_long_name(struct tar_extension *x, char type, const uint8_t *p, size_t n)
{
	n = strnlen((const char *)p, n);
	return type == 'L' ? set_name(x->entry.name, &x->has_name, (const char *)p, n) : set_name(x->entry.link, &x->has_link, (const char *)p, n);
}

void tar_apply(struct tar_entry *e, struct tar_extension *x)
{
	if (x->has_name)
		strcpy(e->name, x->entry.name);
	if (x->has_link)
		strcpy(e->link, x->entry.link);
	if (x->has_size)
		e->size = x->entry.size;
	if (x->has_mtime) {
		e->mtime = x->entry.mtime;
		e->mtime_ns = x->entry.mtime_ns;
	}
	if (x->has_uid)
		e->uid = x->entry.uid;
	if (x->has_gid)
		e->gid = x->entry.gid;
	x->has_name = x->has_link = x->has_size = x->has_mtime = x->has_uid = x->has_gid = false;
}

bool tar_clean_name(char *name)
{
	char *to = name;
	if (*name == '/')
		return false;
	for (char *p = name; *p;) {
		size_t n = strcspn(p, "/");
		if (n == 2 && p[0] == '.' && p[1] == '.')
			return false;
		if (n > 0 && !(n == 1 && p[0] == '.')) {
			if (to > name)
				*to++ = '/';
			memmove(to, p, n);
			to += n;
		}
		p += n;
		p += *p == '/';
	}
	*to = 0;
	return true;
}
