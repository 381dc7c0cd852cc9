#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>
#include "boot.h"
#include "hosts.h"
#include "net.h"
#include "wire.h"

static int up(int fd, const char *name)
{
	struct ifreq r = {0};
	strcpy(r.ifr_name, name);
	if (ioctl(fd, SIOCGIFFLAGS, &r) < 0)
		return -1;
	r.ifr_flags |= IFF_UP | IFF_RUNNING;
	return ioctl(fd, SIOCSIFFLAGS, &r);
}

/* The Ethernet device with the lowest number; bonds, dummies and tunnels, which a kernel may bring along, sit on no bus. */
static bool first_ethernet(int fd, char name[IFNAMSIZ])
{
	int best = INT_MAX;
	struct dirent *entry;
	DIR *dir = opendir("/sys/class/net");
	while (dir && (entry = readdir(dir))) {
		struct ifreq r = {0};
		char device[300];
		snprintf(device, sizeof device, "/sys/class/net/%s/device", entry->d_name);
		if (entry->d_name[0] == '.' || strlen(entry->d_name) >= IFNAMSIZ || access(device, F_OK) < 0)
			continue;
		strcpy(r.ifr_name, entry->d_name);
		if (ioctl(fd, SIOCGIFHWADDR, &r) < 0 || r.ifr_hwaddr.sa_family != ARPHRD_ETHER || ioctl(fd, SIOCGIFINDEX, &r) < 0)
			continue;
		if (r.ifr_ifindex < best) {
			best = r.ifr_ifindex;
			strcpy(name, entry->d_name);
		}
	}
	if (dir)
		closedir(dir);
	return best < INT_MAX;
}

static int set_address(int fd, const char *name, unsigned long what, in_addr_t address)
{
	struct ifreq r = {0};
	struct sockaddr_in *a = (struct sockaddr_in *)&r.ifr_addr;
	strcpy(r.ifr_name, name);
	a->sin_family = AF_INET;
	a->sin_addr.s_addr = address;
	return ioctl(fd, (int)what, &r);
}

static int add_gateway(int fd, char *name, in_addr_t gateway)
{
	struct rtentry r = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = name};
	struct sockaddr_in to = {.sin_family = AF_INET}, via = {.sin_family = AF_INET, .sin_addr.s_addr = gateway};
	memcpy(&r.rt_dst, &to, sizeof to);
	memcpy(&r.rt_genmask, &to, sizeof to);
	memcpy(&r.rt_gateway, &via, sizeof via);
	return ioctl(fd, SIOCADDRT, &r);
}

/* ADDRESS/PREFIX,GATEWAY; the gateway may be left out. */
static void configure_ethernet(int fd, char *spec)
{
	char name[IFNAMSIZ];
	struct in_addr address, gateway;
	char *comma = strchr(spec, ','), *slash = strchr(spec, '/');
	if (comma)
		*comma = 0;
	if (slash)
		*slash = 0;
	int prefix = slash ? atoi(slash + 1) : 24;
	if (inet_pton(AF_INET, spec, &address) != 1 || prefix < 0 || prefix > 32 || (comma && inet_pton(AF_INET, comma + 1, &gateway) != 1)) {
		boot_say("ramet.ip is not ADDRESS/PREFIX,GATEWAY");
		return;
	}
	while (!first_ethernet(fd, name)) {
		if (!boot_wait_device()) {
			boot_say("there is no Ethernet device");
			return;
		}
	}
	const char *mtu = boot_word("ramet.mtu");
	struct ifreq r = {.ifr_mtu = mtu ? atoi(mtu) : 0};
	strcpy(r.ifr_name, name);
	if (mtu && ioctl(fd, SIOCSIFMTU, &r) < 0)
		boot_say("the MTU of %s: %s", name, strerror(errno));
	in_addr_t mask = prefix ? htonl(~0u << (32 - prefix)) : 0;
	if (set_address(fd, name, SIOCSIFADDR, address.s_addr) < 0 || set_address(fd, name, SIOCSIFNETMASK, mask) < 0 || up(fd, name) < 0 ||
	    (comma && add_gateway(fd, name, gateway.s_addr) < 0))
		boot_say("%s: %s", name, strerror(errno));
}

/* --- files of /etc --- */

static bool has_content(const char *path)
{
	struct stat st;
	return stat(path, &st) == 0 && (!S_ISREG(st.st_mode) || st.st_size > 0);
}

static int write_new(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0)
		return -1;
	ssize_t n = write(fd, text, strlen(text));
	close(fd);
	return n < 0 ? -1 : 0;
}

/* A link into /run, say, points nowhere yet: make the way to where it points, and leave the link as the image has it. */
static void make_way(const char *link)
{
	char to[PATH_MAX], path[PATH_MAX + 8];
	ssize_t n = readlink(link, to, sizeof to - 1);
	if (n <= 0)
		return;
	to[n] = 0;
	snprintf(path, sizeof path, "%s%s", to[0] == '/' ? "" : "/etc/", to);
	for (char *p = path + 1; (p = strchr(p, '/')); p++) {
		*p = 0;
		mkdir(path, 0755);
		*p = '/';
	}
}

/* Only where the image has nothing there. */
static void provide(const char *path, const char *text)
{
	static unsigned count;
	char beside[64];
	if (has_content(path))
		return;
	mkdir("/etc", 0755);
	make_way(path);
	if (write_new(path, text) == 0)
		return;
	/* A read-only image: lay a file over its empty one. */
	snprintf(beside, sizeof beside, "/run/.ramet-etc-%u", count++);
	if (errno != EROFS || access(path, F_OK) < 0 || write_new(beside, text) < 0 || mount(beside, path, NULL, MS_BIND, NULL) < 0)
		boot_say("%s: %s", path, strerror(errno));
}

static void name_machine(void)
{
	char name[HOSTNAME_MAX + 1] = "", hosts[HOSTS_MAX];
	const char *word = boot_word("ramet.hostname");
	if (word) {
		snprintf(name, sizeof name, "%s", word);
	} else {
		FILE *f = fopen("/etc/hostname", "re");
		if (f && fgets(name, sizeof name, f))
			name[strcspn(name, " \t\n")] = 0;
		if (f)
			fclose(f);
	}
	if (!name[0])
		strcpy(name, "localhost");
	sethostname(name, strlen(name));
	hosts_text(hosts, name);
	provide("/etc/hosts", hosts);
	/* A disk that came from another machine. */
	if (hosts_rename("/etc/hosts", name) < 0)
		boot_say("/etc/hosts: %s", strerror(errno));
}

void net_configure(void)
{
	char spec[256], servers[300];
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd >= 0) {
		if (up(fd, "lo") < 0)
			boot_say("lo: %s", strerror(errno));
		const char *word = boot_word("ramet.ip");
		if (word)
			configure_ethernet(fd, strcpy(spec, word));
		close(fd);
	}
	const char *dns = boot_word("ramet.dns");
	if (dns) {
		snprintf(servers, sizeof servers, "nameserver %s\n", dns);
		provide("/etc/resolv.conf", servers);
	}
	name_machine();
}
