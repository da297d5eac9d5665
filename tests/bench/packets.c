/* Bounded loads for tests/bench/packets.py.  Each prints nanoseconds of wall time per packet, or bytes per second.
 *
 *   udp SOURCE TARGET PORT COUNT    64-byte packets (IPv6: 16 bytes of payload) from one connected socket
 *   tcp SOURCE TARGET PORT BYTES    one bulk connection; the server is "serve"
 *   serve ADDRESS PORT              accept one connection, read to its end
 *   sink ADDRESS PORT               hold a UDP socket that nobody reads, until stdin ends
 *   tap NAME FRAMEHEX COUNT         write one frame again and again into a tap
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what) { perror(what); exit(1); }

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static struct sockaddr_in6 address(const char *text, const char *port)
{
	struct sockaddr_in6 one = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
	if (inet_pton(AF_INET6, text, &one.sin6_addr) != 1)
		die(text);
	return one;
}

static int made(int kind, const char *source, const char *port)
{
	struct sockaddr_in6 from = address(source, port);
	int yes = 1, fd = socket(AF_INET6, kind, 0);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (fd < 0 || bind(fd, (struct sockaddr *)&from, sizeof from))
		die("bind");
	return fd;
}

static int connected(int kind, char **v)
{
	struct sockaddr_in6 to = address(v[1], v[2]);
	int fd = made(kind, v[0], "0");
	if (connect(fd, (struct sockaddr *)&to, sizeof to))
		die("connect");
	return fd;
}

int main(int argc, char **argv)
{
	static char bytes[1 << 17];
	char **v = argv + 2;
	if (argc < 4)
		return 64;
	if (!strcmp(argv[1], "udp")) {
		int fd = connected(SOCK_DGRAM, v);
		long count = atol(v[3]);
		for (int warm = 0; warm < 2000; warm++)
			send(fd, bytes, 16, 0);
		double began = now();
		for (long i = 0; i < count; i++)
			if (send(fd, bytes, 16, 0) < 0)
				die("send");
		printf("%.1f\n", (now() - began) * 1e9 / count);
	} else if (!strcmp(argv[1], "tcp")) {
		int fd = connected(SOCK_STREAM, v);
		double total = atof(v[3]), left = total, began = now();
		while (left > 0) {
			ssize_t n = send(fd, bytes, sizeof bytes, 0);
			if (n < 0)
				die("send");
			left -= n;
		}
		shutdown(fd, SHUT_WR);
		while (read(fd, bytes, sizeof bytes) > 0)
			;
		printf("%.0f\n", total / (now() - began));
	} else if (!strcmp(argv[1], "serve")) {
		int listener = made(SOCK_STREAM, v[0], v[1]);
		if (listen(listener, 1))
			die("listen");
		puts("ready");
		fflush(stdout);
		int fd = accept(listener, NULL, NULL);
		while (read(fd, bytes, sizeof bytes) > 0)
			;
	} else if (!strcmp(argv[1], "sink")) {
		made(SOCK_DGRAM, v[0], v[1]);
		puts("ready");
		fflush(stdout);
		while (read(0, bytes, 1) > 0)
			;
	} else if (!strcmp(argv[1], "tap")) {
		struct ifreq asked = {.ifr_flags = IFF_TAP | IFF_NO_PI};
		int fd = open("/dev/net/tun", O_RDWR);
		size_t size = strlen(v[1]) / 2;
		long count = atol(v[2]);
		strncpy(asked.ifr_name, v[0], IFNAMSIZ - 1);
		if (fd < 0 || ioctl(fd, TUNSETIFF, &asked))
			die("tap");
		for (size_t i = 0; i < size; i++)
			sscanf(v[1] + 2 * i, "%2hhx", &bytes[i]);
		for (int warm = 0; warm < 2000; warm++)
			if (write(fd, bytes, size) < 0)
				die("write");
		double began = now();
		for (long i = 0; i < count; i++)
			if (write(fd, bytes, size) < 0)
				die("write");
		printf("%.1f\n", (now() - began) * 1e9 / count);
	} else
		return 64;
	return 0;
}
