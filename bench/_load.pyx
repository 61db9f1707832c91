"""Load generators and the servers they talk to: closed loops that check what comes back.

A datagram or message names its client and its number, and the rest of it is computed from those two, so
that what arrives can be checked in full: *lost* never came, *late* came after a later one, *twice* came
again, *corrupt* has the wrong bytes or length, *wrong* belongs to another client.

A closed loop keeps a fixed number in flight and sends the next one only when an answer came (or was given
up), so it measures what is delivered; an open loop would measure how fast a queue overflows.

Every function blocks without the GIL until its time is over; the servers run until they are killed.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memset

from ambassador._linux cimport (
    CLOCK_MONOTONIC,
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    CMSG_NXTHDR,
    CMSG_SPACE,
    EAGAIN,
    ECONNREFUSED,
    EINTR,
    EPOLL_CLOEXEC,
    EPOLL_CTL_ADD,
    EPOLLIN,
    IPPROTO_TCP,
    IPPROTO_UDP,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    TCP_NODELAY,
    UDP_GRO,
    UDP_SEGMENT,
    accept4,
    clock_gettime,
    close,
    cmsghdr,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    epoll_wait,
    errno,
    iovec,
    mmsghdr,
    msghdr,
    recv,
    recvmmsg,
    send,
    sendmmsg,
    sendmsg,
    setsockopt,
    sockaddr_in6,
    timespec,
)

cdef extern from "<poll.h>" nogil:
    enum:
        POLLIN, POLLOUT
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_WAITFORONE

cdef enum:
    BATCH = 64
    LARGEST = 65536
    EVENTS = 256
    FINE_BITS = 6  # of a histogram's bucket: values are told apart to 1.6 %
    BUCKETS = 64 << FINE_BITS

cdef enum:
    MAGIC = 0x67616d62  # "gamb"
    STRAGGLERS_NS = 200000000  # how long answers are waited for when the time is over

cdef struct head_t:  # of every datagram and message; what is behind it is computed from it
    uint32_t magic
    uint32_t client
    uint64_t number
    int64_t sent  # ns

cdef struct tally_t:
    uint64_t sent
    uint64_t delivered
    uint64_t lost
    uint64_t late
    uint64_t twice
    uint64_t corrupt
    uint64_t wrong
    uint64_t refused
    uint64_t histogram[BUCKETS]

cdef struct client_t:
    int fd
    uint32_t index
    uint64_t next  # number of the next to send
    uint64_t expected  # all below it are accounted for
    uint64_t seen  # bit i: number expected - 1 - i came
    int64_t heard
    uint32_t got  # bytes of a TCP answer so far


cdef int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1000000000 + now.tv_nsec


cdef void histogram_add(tally_t *tally, int64_t value) noexcept nogil:
    cdef uint64_t v = <uint64_t>max(value, <int64_t>1)
    cdef int exponent = 0
    while (v >> exponent) >= (2 << FINE_BITS):
        exponent += 1
    tally.histogram[min((exponent << FINE_BITS) + (v >> exponent), <uint64_t>BUCKETS - 1)] += 1


cdef double histogram_quantile(tally_t *tally, double quantile) noexcept nogil:
    """In microseconds."""
    cdef uint64_t total = 0, exponent, mantissa
    cdef uint32_t i
    cdef double wanted
    for i in range(<uint32_t>BUCKETS):
        total += tally.histogram[i]
    if total == 0:
        return 0
    wanted = quantile * total
    for i in range(<uint32_t>BUCKETS):
        wanted -= tally.histogram[i]
        if wanted < 0:
            break
    if i < (2 << FINE_BITS):
        return i / 1000.0
    exponent = (i >> FINE_BITS) - 1
    mantissa = i - (exponent << FINE_BITS)
    return (mantissa + 0.5) * (<uint64_t>1 << exponent) / 1000.0


cdef object tally_result(tally_t *tally, int64_t elapsed):
    return {
        "seconds": elapsed / 1e9,
        "sent": tally.sent,
        "delivered": tally.delivered,
        "lost": tally.lost,
        "late": tally.late,
        "twice": tally.twice,
        "corrupt": tally.corrupt,
        "wrong": tally.wrong,
        "refused": tally.refused,
        "p50": histogram_quantile(tally, 0.5),
        "p99": histogram_quantile(tally, 0.99),
        "p999": histogram_quantile(tally, 0.999),
    }


cdef inline uint64_t pattern(uint32_t client, uint64_t number) noexcept nogil:
    return (number * <uint64_t>0x9E3779B97F4A7C15) ^ (<uint64_t>client << 32) ^ client


cdef void message_write(uint8_t *data, uint32_t size, uint32_t client, uint64_t number, int64_t now) noexcept nogil:
    cdef head_t *head = <head_t *>data
    cdef uint64_t word = pattern(client, number)
    cdef uint64_t *words = <uint64_t *>(data + sizeof(head_t))
    cdef uint32_t i
    head.magic, head.client, head.number, head.sent = MAGIC, client, number, now
    for i in range((size - sizeof(head_t)) // 8):
        words[i] = word
    for i in range(size - (size - sizeof(head_t)) % 8, size):
        data[i] = <uint8_t>word


cdef bint message_intact(uint8_t *data, uint32_t got, uint32_t size) noexcept nogil:
    cdef head_t *head = <head_t *>data
    cdef uint64_t *words = <uint64_t *>(data + sizeof(head_t))
    cdef uint64_t word
    cdef uint32_t i
    if got != size or head.magic != MAGIC:
        return False
    word = pattern(head.client, head.number)
    for i in range((size - sizeof(head_t)) // 8):
        if words[i] != word:
            return False
    for i in range(size - (size - sizeof(head_t)) % 8, size):
        if data[i] != <uint8_t>word:
            return False
    return True


# --------------------------------------------------------------------------------------- UDP, closed loop


cdef struct exchange_t:
    mmsghdr messages[BATCH]
    iovec iov[BATCH]
    uint8_t *buffers  # BATCH x LARGEST
    tally_t tally
    uint32_t depth
    uint32_t size


cdef void client_fill(exchange_t *x, client_t *client, int64_t now) noexcept nogil:
    """Send until `depth` are in flight."""
    cdef uint32_t count = 0, i
    cdef int sent
    while client.next + count - client.expected < x.depth and count < BATCH:
        message_write(x.buffers + count * <size_t>LARGEST, x.size, client.index, client.next + count, now)
        x.iov[count].iov_len = x.size
        count += 1
    i = 0
    while i < count:
        sent = sendmmsg(client.fd, &x.messages[i], count - i, MSG_DONTWAIT)
        if sent > 0:
            i += sent
        elif errno == ECONNREFUSED:
            x.tally.refused += 1
        elif errno != EINTR:
            break
    client.next += i
    x.tally.sent += i


cdef void client_account(exchange_t *x, client_t *client, head_t *head, int64_t now) noexcept nogil:
    """One intact answer."""
    cdef uint64_t ahead
    cdef uint64_t behind
    if head.client != client.index:
        x.tally.wrong += 1
        return
    if head.number >= client.expected:
        ahead = head.number - client.expected
        x.tally.lost += ahead  # until they turn up late
        client.seen = (client.seen << (ahead + 1) if ahead < 63 else 0) | 1
        client.expected = head.number + 1
    else:
        behind = client.expected - 1 - head.number
        if behind >= 64 or client.seen >> behind & 1:
            x.tally.twice += 1
            return
        client.seen |= <uint64_t>1 << behind
        x.tally.lost -= 1
        x.tally.late += 1
    x.tally.delivered += 1
    histogram_add(&x.tally, now - head.sent)


cdef void client_drain(exchange_t *x, client_t *client, int64_t now) noexcept nogil:
    cdef int got, i
    for i in range(BATCH):
        x.iov[i].iov_len = LARGEST
    got = recvmmsg(client.fd, x.messages, BATCH, MSG_DONTWAIT, NULL)
    if got < 0:
        if errno == ECONNREFUSED:
            x.tally.refused += 1
        return
    client.heard = now
    for i in range(got):
        if message_intact(<uint8_t *>x.iov[i].iov_base, x.messages[i].msg_len, x.size):
            client_account(x, client, <head_t *>x.iov[i].iov_base, now)
        else:
            x.tally.corrupt += 1


cdef int64_t exchange_run(
    exchange_t *x, client_t *clients, uint32_t count, int epoll, int64_t duration, int64_t patience
) noexcept nogil:
    """The nanoseconds it took."""
    cdef epoll_event events[EVENTS]
    cdef int64_t start = now_ns(), now = start, checked = start
    cdef uint64_t open = 0
    cdef int ready, i
    cdef uint32_t c
    for c in range(count):
        clients[c].heard = now
        client_fill(x, &clients[c], now)
    while now - start < duration:
        ready = epoll_wait(epoll, events, EVENTS, 20)
        now = now_ns()
        for i in range(max(ready, 0)):
            c = <uint32_t>events[i].data.u64
            client_drain(x, &clients[c], now)
            client_fill(x, &clients[c], now)
        if now - checked > 20000000:
            checked = now
            for c in range(count):
                if now - clients[c].heard > patience:  # given up; what comes all the same is late
                    x.tally.lost += clients[c].next - clients[c].expected
                    client_forget(&clients[c])
                    clients[c].heard = now
                    client_fill(x, &clients[c], now)
    duration = now - start
    checked = now
    while now - checked < STRAGGLERS_NS:
        ready = epoll_wait(epoll, events, EVENTS, 20)
        now = now_ns()
        for i in range(max(ready, 0)):
            client_drain(x, &clients[<uint32_t>events[i].data.u64], now)
        open = 0
        for c in range(count):
            open += clients[c].next - clients[c].expected
        if open == 0:
            break
    x.tally.lost += open
    return duration


cdef void client_forget(client_t *client) noexcept nogil:
    """Give up what is in flight."""
    cdef uint64_t ahead = client.next - client.expected
    client.seen = client.seen << ahead if ahead < 64 else 0
    client.expected = client.next


def udp_exchange(fds, uint32_t depth, uint32_t size, double seconds, uint32_t patience_ms=200):
    """From connected non-blocking sockets, `depth` datagrams of `size` bytes in flight on each."""
    cdef uint32_t count = len(fds), i
    cdef client_t *clients = <client_t *>calloc(count, sizeof(client_t))
    cdef exchange_t *x = <exchange_t *>calloc(1, sizeof(exchange_t))
    cdef epoll_event event
    cdef int epoll = epoll_create1(EPOLL_CLOEXEC)
    cdef int64_t duration = <int64_t>(seconds * 1e9), patience = patience_ms * <int64_t>1000000
    if size < sizeof(head_t) or size > LARGEST or depth < 1 or depth > BATCH:
        raise ValueError("a size of 24 to 65507 and a depth of 1 to 64")
    x.buffers = <uint8_t *>calloc(BATCH, LARGEST)
    x.depth, x.size = depth, size
    for i in range(<uint32_t>BATCH):
        x.iov[i].iov_base = x.buffers + i * <size_t>LARGEST
        x.messages[i].msg_hdr.msg_iov = &x.iov[i]
        x.messages[i].msg_hdr.msg_iovlen = 1
    for i in range(count):
        clients[i].fd, clients[i].index = fds[i], i
        event.events, event.data.u64 = EPOLLIN, i
        if epoll_ctl(epoll, EPOLL_CTL_ADD, clients[i].fd, &event) < 0:
            raise OSError(errno, "epoll_ctl")
    with nogil:
        duration = exchange_run(x, clients, count, epoll, duration, patience)
    result = tally_result(&x.tally, duration)
    close(epoll)
    free(x.buffers)
    free(x)
    free(clients)
    return result


cdef struct echo_t:
    mmsghdr messages[BATCH]
    iovec iov[BATCH]
    sockaddr_in6 names[BATCH]


cdef void echo_run(int fd, echo_t *box) noexcept nogil:
    cdef int got, sent, i
    while True:
        for i in range(BATCH):
            box.iov[i].iov_len = LARGEST
            box.messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_in6)
        got = recvmmsg(fd, box.messages, BATCH, MSG_WAITFORONE, NULL)
        for i in range(max(got, 0)):
            box.iov[i].iov_len = box.messages[i].msg_len
        sent = 0
        while sent < got:
            i = sendmmsg(fd, &box.messages[sent], got - sent, 0)
            sent += max(i, 1)  # one that cannot be sent is lost, and counted by the client


def udp_echo(int fd):
    """Send every datagram back, on a blocking socket. No GRO: most servers do without."""
    cdef echo_t *box = <echo_t *>calloc(1, sizeof(echo_t))
    cdef uint8_t *buffers = <uint8_t *>calloc(BATCH, LARGEST)
    cdef int i
    for i in range(BATCH):
        box.iov[i].iov_base = buffers + i * <size_t>LARGEST
        box.messages[i].msg_hdr.msg_iov = &box.iov[i]
        box.messages[i].msg_hdr.msg_iovlen = 1
        box.messages[i].msg_hdr.msg_name = &box.names[i]
    with nogil:
        echo_run(fd, box)


# -------------------------------------------------------------------------- UDP, bulk from a GSO sender

cdef struct report_t:  # what the sink tells the sender, after every read
    uint32_t magic
    uint32_t run
    uint64_t highest  # number after the highest one that came
    uint64_t received
    uint64_t corrupt
    uint64_t late


cdef int64_t blast_run(
    int fd, uint8_t *data, uint32_t size, uint32_t segments, uint32_t window, int64_t duration,
    uint32_t run, tally_t *tally
) noexcept nogil:
    cdef report_t report
    cdef uint8_t control[64]
    cdef iovec iov
    cdef msghdr header
    cdef cmsghdr *item
    cdef pollfd waiting
    cdef uint64_t number = 0, acknowledged = 0
    cdef int64_t start = now_ns(), now = start, heard = start
    cdef ssize_t got
    cdef uint32_t i
    memset(&header, 0, sizeof(header))
    memset(control, 0, sizeof(control))
    memset(&report, 0, sizeof(report))
    iov.iov_base, iov.iov_len = data, size * <size_t>segments
    header.msg_iov, header.msg_iovlen = &iov, 1
    header.msg_control, header.msg_controllen = control, CMSG_SPACE(sizeof(uint16_t))
    item = CMSG_FIRSTHDR(&header)
    item.cmsg_level, item.cmsg_type, item.cmsg_len = IPPROTO_UDP, UDP_SEGMENT, CMSG_LEN(sizeof(uint16_t))
    (<uint16_t *>CMSG_DATA(item))[0] = size
    waiting.fd, waiting.events = fd, POLLIN
    while now - start < duration:
        while number - acknowledged + segments <= window:
            for i in range(segments):
                message_write(data + i * size, size, run, number + i, now)
            if sendmsg(fd, &header, MSG_DONTWAIT) < 0:
                tally.refused += 1
                break
            number += segments
        poll(&waiting, 1, 20)
        now = now_ns()
        while True:
            got = recv(fd, &report, sizeof(report), MSG_DONTWAIT)
            if got < 0:
                break
            if got == sizeof(report) and report.magic == MAGIC and report.run == run:
                heard = now
                if report.highest > acknowledged:
                    acknowledged = report.highest
                tally.delivered = max(tally.delivered, report.received)
                tally.corrupt, tally.late = report.corrupt, report.late
        if now - heard > 50000000:  # all that was in flight is lost, the last report with it
            acknowledged = number
            heard = now
    tally.sent = number
    tally.lost = number - tally.delivered
    return now - start


def udp_blast(int fd, uint32_t size, uint32_t segments, uint32_t window, double seconds):
    """Runs of `segments` datagrams in one UDP_SEGMENT message, at most `window` datagrams in flight."""
    cdef tally_t *tally = <tally_t *>calloc(1, sizeof(tally_t))
    cdef uint8_t *data = <uint8_t *>calloc(segments, size)
    cdef int64_t duration = <int64_t>(seconds * 1e9)
    cdef uint32_t run = <uint32_t>now_ns()
    if size < sizeof(head_t) or size * segments > 65000:
        raise ValueError("a run is at most 65000 bytes")
    with nogil:
        duration = blast_run(fd, data, size, segments, window, duration, run, tally)
    result = tally_result(tally, duration)
    free(data)
    free(tally)
    return result


cdef struct sink_t:
    mmsghdr messages[BATCH]
    iovec iov[BATCH]
    sockaddr_in6 names[BATCH]
    uint8_t control[BATCH][64]


cdef void sink_run(int fd, sink_t *box) noexcept nogil:
    cdef report_t report
    cdef head_t *head
    cdef cmsghdr *item
    cdef uint32_t segment, start, length
    cdef int got, i
    cdef iovec iov
    cdef msghdr header
    memset(&report, 0, sizeof(report))
    report.magic = MAGIC
    while True:
        for i in range(BATCH):
            box.messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_in6)
            box.messages[i].msg_hdr.msg_controllen = sizeof(box.control[i])
        got = recvmmsg(fd, box.messages, BATCH, MSG_WAITFORONE, NULL)
        if got <= 0:
            continue
        for i in range(got):
            length = segment = box.messages[i].msg_len
            item = CMSG_FIRSTHDR(&box.messages[i].msg_hdr)
            while item != NULL:
                if item.cmsg_level == IPPROTO_UDP and item.cmsg_type == UDP_GRO:
                    segment = (<int *>CMSG_DATA(item))[0]
                item = CMSG_NXTHDR(&box.messages[i].msg_hdr, item)
            start = 0
            while start < length:
                head = <head_t *>(<uint8_t *>box.iov[i].iov_base + start)
                if not message_intact(<uint8_t *>head, min(segment, length - start), segment):
                    report.corrupt += 1
                    start += segment
                    continue
                if head.client != report.run:
                    report.run = head.client
                    report.highest = report.received = report.corrupt = report.late = 0
                report.received += 1
                if head.number < report.highest:
                    report.late += 1
                else:
                    report.highest = head.number + 1
                start += segment
        memset(&header, 0, sizeof(header))
        iov.iov_base, iov.iov_len = &report, sizeof(report)
        header.msg_name, header.msg_namelen = &box.names[got - 1], box.messages[got - 1].msg_hdr.msg_namelen
        header.msg_iov, header.msg_iovlen = &iov, 1
        sendmsg(fd, &header, 0)


def udp_sink(int fd):
    """Count what udp_blast sends and report after every read. With GRO, as a QUIC server has it."""
    cdef sink_t *box = <sink_t *>calloc(1, sizeof(sink_t))
    cdef uint8_t *buffers = <uint8_t *>calloc(BATCH, LARGEST)
    cdef int i, on = 1
    setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on))
    for i in range(BATCH):
        box.iov[i].iov_base, box.iov[i].iov_len = buffers + i * <size_t>LARGEST, LARGEST
        box.messages[i].msg_hdr.msg_iov = &box.iov[i]
        box.messages[i].msg_hdr.msg_iovlen = 1
        box.messages[i].msg_hdr.msg_name = &box.names[i]
        box.messages[i].msg_hdr.msg_control = box.control[i]
    with nogil:
        sink_run(fd, box)


# ----------------------------------------------------------------------------------------------- TCP

cdef enum:
    TCP_DISCARD = 0  # as the first byte of a connection; with any other, what comes is sent back
    DESCRIPTORS = 1 << 20

cdef enum:  # what a connection to the server is for
    MODE_UNKNOWN = 0
    MODE_ECHO = 1
    MODE_DISCARD = 2


cdef bint send_all(int fd, uint8_t *data, size_t size) noexcept nogil:
    cdef size_t done = 0
    cdef ssize_t sent
    cdef pollfd waiting
    while done < size:
        sent = send(fd, data + done, size - done, MSG_NOSIGNAL)
        if sent > 0:
            done += sent
        elif errno == EAGAIN:
            waiting.fd, waiting.events = fd, POLLOUT
            poll(&waiting, 1, 1000)
        elif errno != EINTR:
            return False
    return True


cdef int64_t pingpong_run(
    client_t *clients, uint32_t count, int epoll, uint32_t size, uint8_t *data, uint8_t *answer,
    int64_t duration, tally_t *tally
) noexcept nogil:
    """One message in flight per connection. With one connection there is no epoll in the way."""
    cdef epoll_event events[EVENTS]
    cdef int64_t start = now_ns(), now = start
    cdef client_t *client
    cdef ssize_t got
    cdef int ready = 1, i
    cdef uint32_t c
    for c in range(count):
        message_write(data, size, c, 0, now)
        send_all(clients[c].fd, data, size)
        tally.sent += 1
    events[0].data.u64 = 0
    while now - start < duration:
        if count > 1:
            ready = epoll_wait(epoll, events, EVENTS, 100)
            now = now_ns()
        for i in range(max(ready, 0)):
            client = &clients[events[i].data.u64]
            # Each connection has its place in `answer`, since an answer may come in parts.
            got = recv(
                client.fd, answer + client.index * <size_t>size + client.got, size - client.got,
                MSG_DONTWAIT if count > 1 else 0
            )
            now = now_ns()
            if got < 0 and (errno == EAGAIN or errno == EINTR):
                continue
            if got <= 0:
                tally.lost += 1
                return now - start
            client.got += <uint32_t>got
            if client.got < size:
                continue
            client.got = 0
            tally.delivered += 1
            if not message_intact(answer + client.index * <size_t>size, size, size):
                tally.corrupt += 1
            elif (<head_t *>(answer + client.index * <size_t>size)).client != client.index:
                tally.wrong += 1
            else:
                histogram_add(tally, now - (<head_t *>(answer + client.index * <size_t>size)).sent)
            client.next += 1
            message_write(data, size, client.index, client.next, now)
            if not send_all(client.fd, data, size):
                tally.lost += 1
                return now - start
            tally.sent += 1
    return now - start


def tcp_exchange(fds, uint32_t size, double seconds):
    """Ping-pong on connected sockets: non-blocking if there are several, blocking if it is one."""
    cdef uint32_t count = len(fds), i
    cdef client_t *clients = <client_t *>calloc(count, sizeof(client_t))
    cdef tally_t *tally = <tally_t *>calloc(1, sizeof(tally_t))
    cdef uint8_t *data = <uint8_t *>calloc(1, size)
    cdef uint8_t *answer = <uint8_t *>calloc(count, size)
    cdef int epoll = epoll_create1(EPOLL_CLOEXEC)
    cdef int64_t duration = <int64_t>(seconds * 1e9)
    cdef epoll_event event
    if size < sizeof(head_t):
        raise ValueError("a size of at least 24")
    for i in range(count):
        clients[i].fd, clients[i].index = fds[i], i
        event.events, event.data.u64 = EPOLLIN, i
        if epoll_ctl(epoll, EPOLL_CTL_ADD, clients[i].fd, &event) < 0:
            raise OSError(errno, "epoll_ctl")
    with nogil:
        duration = pingpong_run(clients, count, epoll, size, data, answer, duration, tally)
    result = tally_result(tally, duration)
    close(epoll)
    free(clients)
    free(tally)
    free(data)
    free(answer)
    return result


cdef uint64_t tcp_blast_run(int fd, uint8_t *data, int64_t duration) noexcept nogil:
    cdef int64_t start = now_ns()
    cdef uint64_t total = 0
    while now_ns() - start < duration:
        if not send_all(fd, data, 131072):
            break
        total += 131072
    return total


def tcp_blast(int fd, double seconds):
    """Bytes as fast as they go, to the server's discarding side."""
    cdef uint8_t *data = <uint8_t *>calloc(1, 131072)
    cdef int64_t start = now_ns(), duration = <int64_t>(seconds * 1e9)
    cdef uint64_t total
    memset(data, TCP_DISCARD, 131072)
    with nogil:
        total = tcp_blast_run(fd, data, duration)
    free(data)
    return {"bytes": total, "seconds": (now_ns() - start) / 1e9}


cdef void tcp_server_run(int listener, int epoll, uint8_t *data, uint8_t *modes) noexcept nogil:
    cdef epoll_event events[EVENTS]
    cdef epoll_event event
    cdef int ready, i, fd, on = 1
    cdef ssize_t got
    while True:
        ready = epoll_wait(epoll, events, EVENTS, -1)
        for i in range(max(ready, 0)):
            if <int>events[i].data.u64 == listener:
                fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)
                if fd >= DESCRIPTORS:
                    close(fd)
                elif fd >= 0:
                    modes[fd] = MODE_UNKNOWN
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
                    event.events, event.data.u64 = EPOLLIN, fd
                    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)
                continue
            fd = <int>events[i].data.u64
            got = recv(fd, data, LARGEST, MSG_DONTWAIT)
            if got > 0 and modes[fd] == MODE_UNKNOWN:
                modes[fd] = MODE_DISCARD if data[0] == TCP_DISCARD else MODE_ECHO
            if got > 0 and (modes[fd] == MODE_DISCARD or send_all(fd, data, got)):
                continue
            if got >= 0 or (errno != EAGAIN and errno != EINTR):
                close(fd)


def tcp_server(int fd):
    """Echo, or discard what is zeros; on a non-blocking listener."""
    cdef int epoll = epoll_create1(EPOLL_CLOEXEC)
    cdef epoll_event event
    cdef uint8_t *data = <uint8_t *>calloc(1, LARGEST)
    cdef uint8_t *modes = <uint8_t *>calloc(1, DESCRIPTORS)
    event.events, event.data.u64 = EPOLLIN, fd
    if epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0:
        raise OSError(errno, "epoll_ctl")
    with nogil:
        tcp_server_run(fd, epoll, data, modes)
