#include "params.h"

/* One OPEN is decoded at a time. Only the pages that a request fills are ever touched. */
static char *arguments[VECTOR_MAX];
static char *variables[VECTOR_MAX + ENV_DEFAULTS];

static const char *decode_integer(const uint8_t *p, uint32_t length, uint64_t *value)
{
	if (length == 4)
		*value = get32(p);
	else if (length == 8)
		*value = get64(p);
	else
		return "an integer that is neither 4 nor 8 bytes";
	return NULL;
}

static const char *set_integer(struct request *r, enum tag tag, uint64_t v)
{
	switch (tag) {
	case TAG_TIMEOUT: r->timeout_ms = v; return NULL;
	case TAG_GRACE: r->grace_ms = v; return NULL;
	case TAG_TIME: r->time_ns = v; return NULL;
	default: break;
	}
	if (v > UINT32_MAX)
		return "an integer that is too large";
	uint32_t *to = tag == TAG_ROWS ? &r->rows : tag == TAG_COLS ? &r->cols : tag == TAG_PROCESS ? &r->process :
		       tag == TAG_SIGNAL ? &r->signal : &r->port;
	*to = (uint32_t)v;
	return NULL;
}

static const char *set_string(struct request *r, enum tag tag, char *s, uint32_t length)
{
	if (memchr(s, 0, length))
		return "a string with a zero byte in it";
	switch (tag) {
	case TAG_ARG: r->argv[r->argc++] = s; return NULL;
	case TAG_ENV:
		if (!memchr(s, '=', length))
			return "an environment variable without =";
		r->envp[r->envc++] = s;
		return NULL;
	case TAG_CWD: r->cwd = s; return NULL;
	case TAG_USER: r->user = s; return NULL;
	case TAG_HOST: r->host = s; return NULL;
	case TAG_HOSTNAME: r->hostname = s; return NULL;
	case TAG_MACHINE_ID: r->machine_id = s; return NULL;
	case TAG_GENERATION: r->generation = s; return NULL;
	default:
		if (length > NAME_MAX_BYTES)
			return "a name of more than 64 bytes";
		r->name = s;
		return NULL;
	}
}

static bool is_string(unsigned tag)
{
	return tag <= TAG_USER || tag == TAG_NAME || tag == TAG_HOST || tag >= TAG_HOSTNAME;
}

static const char *decode_one(struct request *r, unsigned tag, uint8_t *p, uint32_t length)
{
	if (tag == 0 || tag >= TAG_LAST)
		return "an unknown parameter";
	if (tag != TAG_ARG && tag != TAG_ENV && given(r, tag))
		return "a parameter given twice";
	r->given |= 1u << tag;
	if (is_string(tag))
		return set_string(r, tag, (char *)p, length);
	if (tag == TAG_ENTROPY) {
		r->entropy = p;
		r->entropy_size = length;
		return length > ENTROPY_MAX ? "more than 512 bytes of entropy" : NULL;
	}
	uint64_t value;
	const char *wrong = decode_integer(p, length, &value);
	return wrong ? wrong : set_integer(r, tag, value);
}

const char *params_decode(struct request *r, uint8_t *buf, size_t len)
{
	*r = (struct request){.argv = arguments, .envp = variables};
	if (len < 4)
		return "an OPEN without an op";
	r->op = get16(buf);
	r->flags = get16(buf + 2);
	if (r->op == 0 || r->op >= OP_LAST)
		return "an unknown op";
	if (r->flags & ~OPEN_FLAGS)
		return "an unknown flag of OPEN";
	/* A string's end is the next parameter's header, or the spare byte: it can be written once that header has been read. */
	uint8_t *unended = NULL;
	for (size_t at = 4; at < len;) {
		if (len - at < PARAM_HEADER)
			return "a parameter that is cut off";
		uint8_t *p = buf + at;
		unsigned tag = get16(p), zero = get16(p + 2);
		uint32_t length = get32(p + 4);
		if (unended)
			*unended = 0;
		if (zero != 0 || length > len - at - PARAM_HEADER)
			return "a parameter that is cut off";
		const char *wrong = decode_one(r, tag, p + PARAM_HEADER, length);
		if (wrong)
			return wrong;
		at += PARAM_HEADER + length;
		unended = buf + at;
	}
	if (unended)
		*unended = 0;
	r->argv[r->argc] = NULL;
	r->envp[r->envc] = NULL;
	return NULL;
}
