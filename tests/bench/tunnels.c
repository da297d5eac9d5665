/* Bounded loads for tests/bench/tunnels.py.  Numbers on stdout; whatever goes wrong ends the program with status 1.
 *
 *   serve ADDRESS PORT                        send back all that is not zero, swallow zeros; until stdin ends
 *   bulk ADDRESS PORT BYTES [STREAMS]         zeros through one connection, or through so many at once, each its share, and the
 *                                             answers: bytes per second of all
 *   ask ADDRESS PORT COUNT                    64-byte requests one after the other: microseconds p50, p99
 *   connect ADDRESS PORT WIDTH SECONDS MOST   connections, WIDTH at a time, each with a byte there and back:
 *                                             how many, per second, microseconds p50, p99
 *   hold ADDRESS PORT COUNT                   "held N SECONDS"; at a line of stdin "answered N SECONDS"; until stdin ends
 *   probe SECONDS ADDRESS PORT...             connect to one port after the other, as fast as they hang up: connects, refused,
 *                                             milliseconds from the end of the last success before a refusal to the next
 *                                             success after all (-1: there was none), connected and reset, and milliseconds
 *                                             that the slowest waited to be accepted
 */
#define _GNU_SOURCE /* accept4 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST = 64, CHUNK = 1 << 17, EVENTS = 256, WIDEST = 64, PATIENCE_MS = 10000, LIMIT_SECONDS = 240 };

static char bytes[CHUNK];

static void die(const char *what) { perror(what); exit(1); }

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static socklen_t address(struct sockaddr_storage *to, const char *text, const char *port)
{
	struct sockaddr_in *four = (void *)to;
	struct sockaddr_in6 *six = (void *)to;
	memset(to, 0, sizeof *to);
	if (inet_pton(AF_INET, text, &four->sin_addr) == 1) {
		four->sin_family = AF_INET;
		four->sin_port = htons(atoi(port));
		return sizeof *four;
	}
	if (inet_pton(AF_INET6, text, &six->sin6_addr) != 1)
		die(text);
	six->sin6_family = AF_INET6;
	six->sin6_port = htons(atoi(port));
	return sizeof *six;
}

static int made(const struct sockaddr_storage *to, int flags)
{
	int yes = 1, fd = socket(to->ss_family, SOCK_STREAM | flags, 0);
	if (fd < 0)
		die("socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
	return fd;
}

static int connected(char **v)
{
	struct sockaddr_storage to;
	socklen_t size = address(&to, v[0], v[1]);
	int fd = made(&to, 0);
	if (connect(fd, (struct sockaddr *)&to, size))
		die("connect");
	return fd;
}

static void send_all(int fd, size_t left)
{
	for (ssize_t n; left; left -= n)
		if ((n = send(fd, bytes, left, MSG_NOSIGNAL)) < 0)
			die("send");
}

static void receive_all(int fd, size_t left)
{
	for (ssize_t n; left; left -= n)
		if ((n = recv(fd, bytes, left, 0)) <= 0)
			die("the connection ended");
}

static int ascending(const void *one, const void *other)
{
	double a = *(const double *)one, b = *(const double *)other;
	return (a > b) - (a < b);
}

/* p50 and p99 of seconds, in microseconds; they are put in order */
static void print_percentiles(double *all, long count)
{
	qsort(all, count, sizeof *all, ascending);
	printf("%.1f %.1f\n", all[count / 2] * 1e6, all[count * 99 / 100] * 1e6);
}

static void watch(int set, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = {.events = events, .data.u64 = data};
	if (epoll_ctl(set, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

/* --- the service behind the bridge ------------------------------------------------------------------------------- */

static void answer(int fd)
{
	ssize_t n = recv(fd, bytes, sizeof bytes, 0), from = 0;
	if (n <= 0) {
		if (n < 0 && errno == EAGAIN)
			return;
		close(fd);
		return;
	}
	if (!bytes[0])
		from = bytes[n - 1] ? n - 1 : n; /* bulk: its last byte alone is answered */
	if (from < n && send(fd, bytes + from, n - from, MSG_NOSIGNAL) < 0)
		close(fd);
}

static void serve(char **v)
{
	struct sockaddr_storage own;
	socklen_t size = address(&own, v[0], v[1]);
	struct epoll_event events[EVENTS];
	int yes = 1, set = epoll_create1(0), listener = made(&own, SOCK_NONBLOCK);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (bind(listener, (struct sockaddr *)&own, size) || listen(listener, 4096))
		die("listen");
	watch(set, listener, EPOLLIN, listener);
	watch(set, 0, EPOLLIN, 0);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(set, events, EVENTS, -1);
		for (int i = 0; i < n; i++) {
			int fd = events[i].data.u64;
			if (!fd)
				return;
			if (fd != listener) {
				answer(fd);
				continue;
			}
			while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
				setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
				watch(set, fd, EPOLLIN, fd);
			}
			if (errno != EAGAIN && errno != ECONNABORTED)
				die("accept");
		}
	}
}

/* --- loads ------------------------------------------------------------------------------------------------------- */

/* zeros, and a byte that is answered when they all have arrived */
static void fill(int fd, double left)
{
	bytes[0] = 0;
	for (; left > sizeof bytes; left -= sizeof bytes)
		send_all(fd, sizeof bytes);
	send_all(fd, left);
	bytes[0] = 1;
	send_all(fd, 1);
	receive_all(fd, 1);
}

static void bulk(char **v, int streams)
{
	double share = atof(v[2]) / streams, began;
	int fds[WIDEST], status = 0;
	if (streams < 1 || streams > WIDEST)
		exit(64);
	for (int i = 0; i < streams; i++) {
		fds[i] = connected(v);
		bytes[0] = 1;
		send_all(fds[i], 1); /* the bridge is through */
		receive_all(fds[i], 1);
	}
	began = now();
	for (int i = 1; i < streams; i++)
		if (!fork()) {
			alarm(LIMIT_SECONDS);
			fill(fds[i], share);
			_exit(0);
		}
	fill(fds[0], share);
	for (int i = 1; i < streams; i++)
		if (wait(&status) < 0 || status)
			die("a stream was lost");
	printf("%.0f\n", share * streams / (now() - began));
}

static void ask(char **v)
{
	int fd = connected(v);
	long count = atol(v[2]), warm = count / 10;
	double *took = calloc(count, sizeof *took);
	memset(bytes, 'a', REQUEST);
	for (long i = -warm; i < count; i++) {
		double began = now();
		send_all(fd, REQUEST);
		receive_all(fd, REQUEST);
		if (i >= 0)
			took[i] = now() - began;
	}
	print_percentiles(took, count);
}

struct slot {
	int fd, asked;
	double began;
};

/* Begin a connection, or go on with one that is there and writable: ask a byte.  The answer makes it readable. */
static void begin(struct slot *slot, int set, uint64_t number, const struct sockaddr_storage *to, socklen_t size)
{
	*slot = (struct slot){.fd = made(to, SOCK_NONBLOCK), .began = now()};
	if (connect(slot->fd, (const struct sockaddr *)to, size) && errno != EINPROGRESS)
		die("connect");
	watch(set, slot->fd, EPOLLOUT, number);
}

/* 1: has its answer; -1: was lost; 0: still on its way */
static int proceed(struct slot *slot, int set, uint64_t number)
{
	char byte = 'a';
	if (slot->asked)
		return recv(slot->fd, &byte, 1, 0) == 1 ? 1 : -1;
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = number};
	if (send(slot->fd, &byte, 1, MSG_NOSIGNAL) != 1 || epoll_ctl(set, EPOLL_CTL_MOD, slot->fd, &event))
		return -1;
	slot->asked = 1;
	return 0;
}

static void connects(char **v)
{
	struct sockaddr_storage to;
	socklen_t size = address(&to, v[0], v[1]);
	struct slot slots[WIDEST];
	struct epoll_event events[EVENTS];
	long width = atol(v[2]), most = atol(v[4]), started = 0, done = 0;
	int set = epoll_create1(0);
	double *took = calloc(most, sizeof *took), began = now(), end = began + atof(v[3]);
	if (width > WIDEST || most < width)
		exit(64);
	while (started < width)
		begin(&slots[started], set, started, &to, size), started++;
	while (done < started) {
		int n = epoll_wait(set, events, EVENTS, -1);
		for (int i = 0; i < n; i++) {
			struct slot *slot = &slots[events[i].data.u64];
			int state = proceed(slot, set, events[i].data.u64);
			if (state < 0)
				die("a connection was lost");
			if (!state)
				continue;
			took[done++] = now() - slot->began;
			close(slot->fd);
			if (started < most && now() < end)
				begin(slot, set, events[i].data.u64, &to, size), started++;
		}
	}
	printf("%ld %.1f ", done, done / (now() - began));
	print_percentiles(took, done);
}

static long ask_each(const int *held, long count)
{
	long answered = 0;
	memset(bytes, 'a', REQUEST);
	for (long from = 0; from < count; from += WIDEST) {
		long to = from + WIDEST < count ? from + WIDEST : count;
		int asked[WIDEST];
		for (long i = from; i < to; i++)
			asked[i - from] = send(held[i], bytes, REQUEST, MSG_NOSIGNAL) == REQUEST;
		for (long i = from; i < to; i++) {
			struct pollfd one = {.fd = held[i], .events = POLLIN};
			char back[REQUEST];
			ssize_t there = 0, n = 1;
			while (asked[i - from] && there < REQUEST && n > 0 && poll(&one, 1, PATIENCE_MS) == 1)
				if ((n = recv(one.fd, back + there, REQUEST - there, 0)) > 0)
					there += n;
			answered += there == REQUEST && !memcmp(back, bytes, REQUEST);
		}
	}
	return answered;
}

static void hold(char **v)
{
	struct sockaddr_storage to;
	socklen_t size = address(&to, v[0], v[1]);
	struct epoll_event events[EVENTS];
	long count = atol(v[2]), started = 0, ended = 0, open = 0;
	struct slot *slots = calloc(count, sizeof *slots);
	int *held = calloc(count, sizeof *held), set = epoll_create1(0);
	double began = now();
	while (ended < count) {
		while (started < count && started - ended < WIDEST) {
			begin(&slots[started], set, started, &to, size);
			started++;
		}
		int n = epoll_wait(set, events, EVENTS, -1);
		for (int i = 0; i < n; i++) {
			struct slot *slot = &slots[events[i].data.u64];
			int state = proceed(slot, set, events[i].data.u64);
			if (!state)
				continue;
			ended++;
			epoll_ctl(set, EPOLL_CTL_DEL, slot->fd, NULL);
			if (state > 0)
				held[open++] = slot->fd;
			else
				close(slot->fd);
		}
	}
	printf("held %ld %.2f\n", open, now() - began);
	fflush(stdout);
	while (read(0, bytes, 1) == 1) {
		began = now();
		long answered = ask_each(held, open);
		printf("answered %ld %.2f\n", answered, now() - began);
		fflush(stdout);
	}
}

static void probe(char **v, int ports)
{
	double end = now() + atof(v[0]), heard = 0, lost = 0, back = 0, longest = 0;
	long connects = 0, refused = 0, reset = 0;
	struct timeval patience = {.tv_sec = 1};
	for (long i = 0; now() < end; i++) {
		struct sockaddr_storage to;
		socklen_t size = address(&to, v[1], v[2 + i % ports]);
		int fd = made(&to, 0);
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
		if (!connect(fd, (struct sockaddr *)&to, size)) {
			double taken = now();
			connects++;
			if (lost && !back)
				back = taken;
			shutdown(fd, SHUT_WR); /* who accepts hangs up, so that there is never a queue of them */
			reset += recv(fd, bytes, 1, 0) < 0;
			heard = now();
			if (heard - taken > longest)
				longest = heard - taken;
		} else if (errno == ECONNREFUSED) {
			refused++;
			if (!lost)
				lost = heard;
			back = 0;
		} else
			die("connect");
		close(fd);
	}
	printf("%ld %ld %.3f %ld %.3f\n", connects, refused, lost ? (back ? back - lost : -1e-3) * 1e3 : 0, reset, longest * 1e3);
}

int main(int argc, char **argv)
{
	char **v = argv + 2;
	if (argc < 4)
		return 64;
	if (!strcmp(argv[1], "serve")) {
		serve(v);
		return 0;
	}
	alarm(LIMIT_SECONDS);
	if (!strcmp(argv[1], "bulk") && argc == 5)
		bulk(v, 1);
	else if (!strcmp(argv[1], "bulk") && argc == 6)
		bulk(v, atoi(v[3]));
	else if (!strcmp(argv[1], "ask") && argc == 5)
		ask(v);
	else if (!strcmp(argv[1], "connect") && argc == 7)
		connects(v);
	else if (!strcmp(argv[1], "hold") && argc == 5)
		hold(v);
	else if (!strcmp(argv[1], "probe") && argc > 4)
		probe(v, argc - 4);
	else
		return 64;
	return 0;
}
