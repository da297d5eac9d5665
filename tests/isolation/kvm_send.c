/*
 * What any root of a guest can do, and busybox cannot:
 *
 *   send frame INTERFACE HEX	put a frame on the wire exactly as given
 *   send datagram FROM TO	send a datagram by the guest's own stack; when this ends it has left, or a question for TO's MAC has
 */
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

static int frame(const char *interface, const char *hex)
{
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(interface)};
	int wire = socket(AF_PACKET, SOCK_RAW, 0);
	size_t length = strlen(hex) / 2;
	unsigned char bytes[2048];

	if (length > sizeof bytes)
		return 2;
	for (size_t at = 0; at < length; at++)
		if (sscanf(hex + 2 * at, "%2hhx", &bytes[at]) != 1)
			return 2;
	return sendto(wire, bytes, length, 0, (struct sockaddr *)&to, sizeof to) != (ssize_t)length;
}

static socklen_t address(const char *text, in_port_t port, struct sockaddr_storage *into)
{
	struct sockaddr_in *four = (struct sockaddr_in *)into;
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)into;

	memset(into, 0, sizeof *into);
	if (inet_pton(AF_INET, text, &four->sin_addr) == 1) {
		four->sin_family = AF_INET;
		four->sin_port = htons(port);
		return sizeof *four;
	}
	if (inet_pton(AF_INET6, text, &six->sin6_addr) != 1)
		return 0;
	six->sin6_family = AF_INET6;
	six->sin6_port = htons(port);
	return sizeof *six;
}

static int datagram(const char *from, const char *to)
{
	struct sockaddr_storage source, target;
	socklen_t source_length = address(from, 0, &source), target_length = address(to, 9, &target);
	int udp = socket(source.ss_family, SOCK_DGRAM, 0);

	return bind(udp, (struct sockaddr *)&source, source_length) < 0 ||
	       sendto(udp, from, strlen(from), 0, (struct sockaddr *)&target, target_length) < 0;
}

int main(int count, char **words)
{
	int failed = 2;

	if (count == 4 && strcmp(words[1], "frame") == 0)
		failed = frame(words[2], words[3]);
	if (count == 4 && strcmp(words[1], "datagram") == 0)
		failed = datagram(words[2], words[3]);
	if (failed == 1)
		perror("send");
	return failed;
}
