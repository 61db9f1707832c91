# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A closed loop over UDP that checks every answer, and the echo server it talks to.

A datagram names its client and its number, and the rest of it follows from those two. So each one that arrives is
checked in full: *lost* never came, *late* came after a later one, *twice* came again, *corrupt* has wrong bytes or
a wrong length, *wrong* belongs to another client.

The loop keeps a fixed number of datagrams in flight. It sends the next one only when an answer came or was given
up, so it measures what is delivered; an open loop would measure how fast a queue overflows.

Both functions block without the GIL. A process runs one of them at a time.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from ambassador._linux cimport (
    CLOCK_MONOTONIC, EINTR, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLIN, MSG_DONTWAIT, clock_gettime, close,
    epoll_create1, epoll_ctl, epoll_event, epoll_wait, errno, iovec, mmsghdr, recvmmsg, sendmmsg, sockaddr_in6,
    timespec,
)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_WAITFORONE

cdef enum:
    BATCH = 64
    CLIENTS = 256
    LARGEST = 2048
    LARGEST_WORDS = 256
    MAGIC = 0x67616d62  # "gamb"
    MS = 1000000  # ns
    PATIENCE = 200 * MS  # without an answer, until a client gives up what is in flight
    STRAGGLERS = 200 * MS  # how long the loop waits for answers at the end

cdef struct head_t:  # of every datagram; the words behind it follow from it
    uint32_t magic
    uint32_t client
    uint64_t number

cdef struct tally_t:
    uint64_t delivered
    uint64_t lost
    uint64_t late
    uint64_t twice
    uint64_t corrupt
    uint64_t wrong

cdef struct client_t:
    int fd
    uint32_t index
    uint64_t next  # number of the next to send
    uint64_t expected  # all below it are accounted for
    uint64_t seen  # bit i: number expected - 1 - i came
    int64_t heard

cdef client_t clients[CLIENTS]
cdef mmsghdr messages[BATCH]
cdef iovec iov[BATCH]
cdef sockaddr_in6 names[BATCH]
cdef uint64_t buffers[BATCH][LARGEST_WORDS]
cdef tally_t tally


cdef void messages_init(bint named) noexcept nogil:
    cdef int i
    for i in range(BATCH):
        iov[i].iov_base = buffers[i]
        messages[i].msg_hdr.msg_iov = &iov[i]
        messages[i].msg_hdr.msg_iovlen = 1
        messages[i].msg_hdr.msg_name = &names[i] if named else NULL


cdef int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1000000000 + now.tv_nsec


cdef inline uint64_t pattern(uint32_t client, uint64_t number) noexcept nogil:
    return (number * <uint64_t>0x9E3779B97F4A7C15) ^ (<uint64_t>client << 32) ^ client


cdef void message_write(uint64_t *words, uint32_t size, uint32_t client, uint64_t number) noexcept nogil:
    cdef head_t *head = <head_t *>words
    cdef uint64_t word = pattern(client, number)
    cdef uint32_t i
    head.magic, head.client, head.number = MAGIC, client, number
    for i in range(sizeof(head_t) // 8, size // 8):
        words[i] = word


cdef bint message_intact(uint64_t *words, uint32_t got, uint32_t size) noexcept nogil:
    cdef head_t *head = <head_t *>words
    cdef uint64_t word = pattern(head.client, head.number)
    cdef uint32_t i
    if got != size or head.magic != MAGIC:
        return False
    for i in range(sizeof(head_t) // 8, size // 8):
        if words[i] != word:
            return False
    return True


cdef void client_fill(client_t *client, uint32_t depth, uint32_t size) noexcept nogil:
    """Send until `depth` are in flight."""
    cdef uint32_t count = 0, i = 0
    cdef int sent
    while client.next + count - client.expected < depth and count < BATCH:
        message_write(buffers[count], size, client.index, client.next + count)
        iov[count].iov_len = size
        count += 1
    while i < count:
        sent = sendmmsg(client.fd, &messages[i], count - i, MSG_DONTWAIT)
        if sent > 0:
            i += sent
        elif errno != EINTR:
            break
    client.next += i


cdef void client_account(client_t *client, head_t *head) noexcept nogil:
    """One intact answer."""
    cdef uint64_t ahead, behind
    if head.client != client.index:
        tally.wrong += 1
        return
    if head.number >= client.expected:
        ahead = head.number - client.expected
        tally.lost += ahead  # until they turn up late
        client.seen = (client.seen << (ahead + 1) if ahead < 63 else 0) | 1
        client.expected = head.number + 1
    else:
        behind = client.expected - 1 - head.number
        if behind >= 64 or client.seen >> behind & 1:
            tally.twice += 1
            return
        client.seen |= <uint64_t>1 << behind
        tally.lost -= 1
        tally.late += 1
    tally.delivered += 1


cdef void client_drain(client_t *client, int64_t now, uint32_t size) noexcept nogil:
    cdef int got, i
    for i in range(BATCH):
        iov[i].iov_len = LARGEST
    got = recvmmsg(client.fd, messages, BATCH, MSG_DONTWAIT, NULL)
    if got > 0:
        client.heard = now
    for i in range(max(got, 0)):
        if message_intact(buffers[i], messages[i].msg_len, size):
            client_account(client, <head_t *>buffers[i])
        else:
            tally.corrupt += 1


cdef uint64_t client_forget(client_t *client) noexcept nogil:
    """Give up what is in flight, and return how many that are. An answer that still comes is late."""
    cdef uint64_t ahead = client.next - client.expected
    client.seen = client.seen << ahead if ahead < 64 else 0
    client.expected = client.next
    return ahead


cdef int64_t exchange_run(uint32_t count, int epoll, uint32_t depth, uint32_t size, int64_t time) noexcept nogil:
    """The nanoseconds it took."""
    cdef epoll_event events[CLIENTS]
    cdef int64_t start = now_ns(), now = start, checked = start, took
    cdef uint64_t open = 1
    cdef int ready, i
    cdef uint32_t c
    for c in range(count):
        clients[c].heard = now
        client_fill(&clients[c], depth, size)
    while now - start < time:
        ready = epoll_wait(epoll, events, CLIENTS, 20)
        now = now_ns()
        for i in range(max(ready, 0)):
            c = <uint32_t>events[i].data.u64
            client_drain(&clients[c], now, size)
            client_fill(&clients[c], depth, size)
        if now - checked > 20 * MS:
            checked = now
            for c in range(count):
                if now - clients[c].heard > PATIENCE:
                    tally.lost += client_forget(&clients[c])
                    clients[c].heard = now
                    client_fill(&clients[c], depth, size)
    took = now - start
    while open and now - start < took + STRAGGLERS:
        ready = epoll_wait(epoll, events, CLIENTS, 20)
        now = now_ns()
        for i in range(max(ready, 0)):
            client_drain(&clients[<uint32_t>events[i].data.u64], now, size)
        open = 0
        for c in range(count):
            open += clients[c].next - clients[c].expected
    tally.lost += open
    return took


def udp_exchange(fds, uint32_t depth, uint32_t size, double seconds):
    """From connected non-blocking sockets, `depth` datagrams of `size` bytes in flight on each."""
    cdef uint32_t count = len(fds), i
    cdef epoll_event event
    cdef int epoll
    cdef int64_t time = <int64_t>(seconds * 1e9)
    if not sizeof(head_t) <= size <= LARGEST or size % 8 or not 1 <= depth <= BATCH or count > CLIENTS:
        raise ValueError("a size of 16 to 2048 in words of 8 bytes, a depth of 1 to 64, 256 sockets at most")
    memset(&tally, 0, sizeof(tally))
    memset(clients, 0, sizeof(clients))
    messages_init(False)
    epoll = epoll_create1(EPOLL_CLOEXEC)
    for i in range(count):
        clients[i].fd, clients[i].index = fds[i], i
        event.events, event.data.u64 = EPOLLIN, i
        if epoll_ctl(epoll, EPOLL_CTL_ADD, clients[i].fd, &event) < 0:
            raise OSError(errno, "epoll_ctl")
    with nogil:
        time = exchange_run(count, epoll, depth, size, time)
    close(epoll)
    return {"seconds": time / 1e9, **tally}


cdef void echo_run(int fd) noexcept nogil:
    cdef int got, sent, i
    while True:
        for i in range(BATCH):
            iov[i].iov_len = LARGEST
            messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_in6)
        got = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL)
        for i in range(max(got, 0)):
            iov[i].iov_len = messages[i].msg_len
        sent = 0
        while sent < got:
            i = sendmmsg(fd, &messages[sent], got - sent, 0)
            sent += max(i, 1)  # the client counts one that cannot be sent as lost


def udp_echo(int fd):
    """Send every datagram back, on a blocking socket. Without GRO, as most servers."""
    messages_init(True)
    with nogil:
        echo_run(fd)
