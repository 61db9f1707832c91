"""Batches of messages: receive with recvmmsg, send with sendmmsg, join runs with UDP_SEGMENT.

Invariants: a receive batch's buffers stay untouched while `used` covers them; a send batch to a backend is of
one session; all that is added to a send batch lives until the flush.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from ambassador._backends cimport address_t
from ambassador._dial cimport socket_redial
from ambassador._linux cimport (
    AF_INET6,
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    CMSG_NXTHDR,
    CMSG_SPACE,
    EADDRNOTAVAIL,
    ECONNREFUSED,
    EINTR,
    EINVAL,
    EIO,
    EMSGSIZE,
    IP_PKTINFO,
    IP_TTL,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPPROTO_UDP,
    IPV6_HOPLIMIT,
    IPV6_PKTINFO,
    MSG_DONTWAIT,
    UDP_GRO,
    UDP_SEGMENT,
    cmsghdr,
    errno,
    in6_pktinfo,
    in_pktinfo,
    iovec,
    mmsghdr,
    msghdr,
    munmap,
    recvmmsg,
    send,
    sendmmsg,
    sendmsg,
)
from ambassador._loop cimport pages_map
from ambassador._options cimport GSO
from ambassador._udp cimport (
    BUFFER_BYTES,
    BYTES_TO_BACKEND,
    DROPPED_SEND_TO_BACKEND,
    GSO_REFUSED,
    HEADER_BYTES,
    KERNEL_SOURCE,
    MAX_RUN_BYTES,
    MAX_RUN_SEGMENTS,
    MESSAGES_TO_BACKEND,
    RECEIVE_BATCH,
    REFUSED,
    SEND_BATCH,
    SENT_TO_BACKEND,
    SINGLE_READS,
    TO_BACKEND,
    TO_CLIENT,
    key_t,
    loop_t,
    reads_t,
    receive_batch_t,
    send_batch_t,
    session_t,
)

# --------------------------------------------------------------------------------------------- receive


cdef inline void receive_rearm(receive_batch_t *batch, uint32_t count) noexcept nogil:
    """Give the first `count` headers their room again: the kernel writes into them how much it used."""
    cdef uint32_t i
    for i in range(count):
        batch.messages[i].msg_hdr.msg_namelen = sizeof(address_t)
        batch.messages[i].msg_hdr.msg_controllen = HEADER_BYTES
        batch.messages[i].msg_hdr.msg_flags = 0


cdef inline void receive_unmap(receive_batch_t *batch) noexcept nogil:
    if batch != NULL:
        if batch.buffers != NULL:
            munmap(batch.buffers, RECEIVE_BATCH * BUFFER_BYTES)
        munmap(batch, sizeof(receive_batch_t))


cdef inline receive_batch_t *receive_map() noexcept nogil:
    """Return an empty batch, NULL without memory. receive_unmap frees it."""
    cdef receive_batch_t *batch = <receive_batch_t *>pages_map(sizeof(receive_batch_t))
    cdef uint32_t i
    if batch == NULL:
        return NULL
    batch.buffers = <char *>pages_map(RECEIVE_BATCH * BUFFER_BYTES)
    if batch.buffers == NULL:
        receive_unmap(batch)
        return NULL
    for i in range(<uint32_t>RECEIVE_BATCH):
        batch.iov[i].iov_base = batch.buffers + i * BUFFER_BYTES
        batch.iov[i].iov_len = BUFFER_BYTES
        batch.messages[i].msg_hdr.msg_iov = &batch.iov[i]
        batch.messages[i].msg_hdr.msg_iovlen = 1
        batch.messages[i].msg_hdr.msg_control = &batch.control[i][0]
        batch.messages[i].msg_hdr.msg_name = &batch.names[i]
    receive_rearm(batch, RECEIVE_BATCH)
    return batch


cdef inline int receive(loop_t *loop, int fd, reads_t *reads) noexcept nogil:
    """Receive behind the messages in use. Return how many came; 0 for none, or with errno for a past error.

    To ask for a message that is not there costs 0.2 us. So if messages come one at a time, ask for no second.
    If there is one, epoll reports it in the very next turn, which takes all, as do the turns after it. So do
    this only if the next turn is sure to have room for this socket.
    """
    cdef receive_batch_t *batch = loop.receive_batch
    cdef uint32_t most = RECEIVE_BATCH - batch.used
    cdef bint again = reads.turn + 1 == loop.turn
    cdef int got
    receive_rearm(batch, batch.dirty)
    batch.dirty = 0
    if reads.single == SINGLE_READS and not (again or loop.batch_full or loop.draining):
        most = 1
    reads.turn = loop.turn
    while True:
        got = recvmmsg(fd, &batch.messages[batch.used], most, MSG_DONTWAIT, NULL)
        if got >= 0 or errno != EINTR:
            break
    if got < 0 and errno == ECONNREFUSED:
        loop.tally[REFUSED] += 1
    if got <= 0:
        return 0
    batch.dirty = batch.used + got
    if got > 1 or (again and reads.single == SINGLE_READS):
        reads.single = 0
    elif most > 1:
        reads.single = min(reads.single + 1, SINGLE_READS)
    return got


cdef inline uint32_t message_segment(msghdr *header, key_t *key, int *hops) noexcept nogil:
    """Return the size of a run's datagrams, 0 for a single one.

    Fill in the hop limit that it arrived with and the local address to answer from, unless `key` is NULL.
    Nobody can answer from a multicast address, so that is 0, the kernel's choice; nor from a broadcast
    address, for which IPv4 names a local one. A dual-stack socket reports the latter behind the IPv6 form.
    """
    cdef cmsghdr *item = CMSG_FIRSTHDR(header)
    cdef uint32_t segment = 0
    cdef int place = 0
    while item != NULL:
        if item.cmsg_level == IPPROTO_UDP and item.cmsg_type == UDP_GRO:
            segment = (<int *>CMSG_DATA(item))[0]
        elif key == NULL:
            pass
        elif item.cmsg_level == IPPROTO_IPV6 and item.cmsg_type == IPV6_PKTINFO:
            memcpy(key.local, &(<in6_pktinfo *>CMSG_DATA(item)).ipi6_addr, 16)
            place = 12
            if (<uint8_t *>key.local)[0] == 0xFF:
                memset(key.local, 0, 16)
        elif item.cmsg_level == IPPROTO_IP and item.cmsg_type == IP_PKTINFO:
            memcpy(<uint8_t *>key.local + place, &(<in_pktinfo *>CMSG_DATA(item)).ipi_spec_dst, 4)
        elif (
            item.cmsg_level == IPPROTO_IP and item.cmsg_type == IP_TTL
            or item.cmsg_level == IPPROTO_IPV6 and item.cmsg_type == IPV6_HOPLIMIT
        ):
            hops[0] = (<int *>CMSG_DATA(item))[0]
        item = CMSG_NXTHDR(header, item)
    return segment


cdef inline uint32_t message_datagrams(uint32_t length, uint32_t segment) noexcept nogil:
    if segment == 0 or segment >= length:
        return 1
    return (length + segment - 1) // segment


# ------------------------------------------------------------------------------------------------ send


cdef inline void send_append(
    send_batch_t *batch, session_t *session, void *data, uint32_t length, uint32_t segment, uint32_t segments
) noexcept nogil:
    """Add a new message. There must be room."""
    cdef uint32_t place = batch.count
    batch.sessions[place] = session
    batch.segment[place] = segment
    batch.segments[place] = segments
    batch.bytes[place] = length
    batch.complete[place] = length != segment * segments
    batch.iov[batch.iovs].iov_base = data
    batch.iov[batch.iovs].iov_len = length
    memset(&batch.messages[place], 0, sizeof(mmsghdr))
    batch.messages[place].msg_hdr.msg_iov = &batch.iov[batch.iovs]
    batch.messages[place].msg_hdr.msg_iovlen = 1
    batch.count += 1
    batch.iovs += 1


cdef inline bint send_join(
    send_batch_t *batch, session_t *session, void *data, uint32_t length, uint32_t segment, uint32_t segments
) noexcept nogil:
    """Extend the last message, as a part of the same run. False if it does not fit."""
    cdef uint32_t place = batch.count - 1
    if batch.count == 0 or batch.sessions[place] != session or batch.complete[place] or length == 0:
        return False
    if segment != batch.segment[place] and not (segments == 1 and length < batch.segment[place]):
        return False
    if batch.segments[place] + segments > MAX_RUN_SEGMENTS or batch.bytes[place] + length > MAX_RUN_BYTES:
        return False
    batch.iov[batch.iovs].iov_base = data
    batch.iov[batch.iovs].iov_len = length
    batch.iovs += 1
    batch.messages[place].msg_hdr.msg_iovlen += 1
    batch.segments[place] += segments
    batch.bytes[place] += length
    batch.complete[place] = batch.bytes[place] != batch.segments[place] * batch.segment[place]
    return True


cdef inline bint is_ipv4_form(key_t *key) noexcept nogil:
    """Whether an IPv6 socket's client has an IPv4 address."""
    return key.client[0] == 0 and (<uint8_t *>key.client)[10] == 0xFF


cdef inline void send_headers(send_batch_t *batch, uint32_t place, int d) noexcept nogil:
    """Write one message's headers: the client, the local address, and the size of a run's segments."""
    cdef session_t *session = batch.sessions[place]
    cdef msghdr *header = &batch.messages[place].msg_hdr
    cdef cmsghdr *item
    cdef in6_pktinfo *local6
    cdef in_pktinfo *local4
    cdef size_t used = 0, prefix
    if d == TO_BACKEND and batch.segments[place] == 1:
        return
    header.msg_control = &batch.control[place][0]
    header.msg_controllen = HEADER_BYTES
    memset(header.msg_control, 0, HEADER_BYTES)
    item = CMSG_FIRSTHDR(header)
    if d == TO_CLIENT:
        header.msg_name = &session.client
        header.msg_namelen = session.client_length
        if session.client.v6.sin6_family == AF_INET6:
            item.cmsg_level, item.cmsg_type = IPPROTO_IPV6, IPV6_PKTINFO
            item.cmsg_len = CMSG_LEN(sizeof(in6_pktinfo))
            local6 = <in6_pktinfo *>CMSG_DATA(item)
            memcpy(&local6.ipi6_addr, session.key.local, 16)
            if session.flags & KERNEL_SOURCE:
                prefix = 12 if is_ipv4_form(&session.key) else 0
                memset(<uint8_t *>&local6.ipi6_addr + prefix, 0, 16 - prefix)
            used += CMSG_SPACE(sizeof(in6_pktinfo))
        else:
            item.cmsg_level, item.cmsg_type = IPPROTO_IP, IP_PKTINFO
            item.cmsg_len = CMSG_LEN(sizeof(in_pktinfo))
            local4 = <in_pktinfo *>CMSG_DATA(item)
            if not session.flags & KERNEL_SOURCE:
                memcpy(&local4.ipi_spec_dst, session.key.local, 4)
            used += CMSG_SPACE(sizeof(in_pktinfo))
        item = CMSG_NXTHDR(header, item)
    if batch.segments[place] > 1:
        item.cmsg_level, item.cmsg_type = IPPROTO_UDP, UDP_SEGMENT
        item.cmsg_len = CMSG_LEN(sizeof(uint16_t))
        (<uint16_t *>CMSG_DATA(item))[0] = batch.segment[place]
        used += CMSG_SPACE(sizeof(uint16_t))
    header.msg_controllen = used


cdef inline bint send_unbind_source(send_batch_t *batch, uint32_t place, int error) noexcept nogil:
    """Let the kernel choose where the session's replies leave from, if it refuses the address that the client
    wrote to. Whether to send again."""
    cdef session_t *session = batch.sessions[place]
    if (error != EINVAL and error != EADDRNOTAVAIL) or session.flags & KERNEL_SOURCE:
        return False
    session.flags |= KERNEL_SOURCE
    send_headers(batch, place, TO_CLIENT)
    return True


cdef inline void send_split(loop_t *loop, int fd, uint32_t place, int d) noexcept nogil:
    """Send a run one datagram at a time: its route did not take it whole."""
    cdef send_batch_t *batch = loop.send_batch
    cdef msghdr header = batch.messages[place].msg_hdr
    cdef iovec *run = header.msg_iov
    cdef size_t parts = header.msg_iovlen, i, start
    cdef iovec piece
    # The packet info comes first and stays; the size of the segments, behind it, goes.
    header.msg_controllen -= CMSG_SPACE(sizeof(uint16_t))
    header.msg_iov = &piece
    header.msg_iovlen = 1
    for i in range(parts):
        start = 0
        while start < run[i].iov_len:
            piece.iov_base = <char *>run[i].iov_base + start
            piece.iov_len = min(<size_t>batch.segment[place], run[i].iov_len - start)
            start += piece.iov_len
            if sendmsg(fd, &header, MSG_DONTWAIT) < 0 and not (
                d == TO_BACKEND
                and socket_redial(loop, batch.sessions[place], errno)
                and sendmsg(fd, &header, MSG_DONTWAIT) >= 0
            ):
                loop.tally[DROPPED_SEND_TO_BACKEND + d] += 1
            else:
                loop.tally[SENT_TO_BACKEND + d] += 1
                loop.tally[BYTES_TO_BACKEND + d] += piece.iov_len
                loop.tally[MESSAGES_TO_BACKEND + d] += 1


cdef inline int send_from(send_batch_t *batch, int fd, uint32_t place, int d) noexcept nogil:
    """Send the messages from `place` on; the result of sendmmsg(2). A lone datagram to a backend needs no
    header."""
    if place + 1 < batch.count or d == TO_CLIENT or batch.segments[place] > 1:
        return sendmmsg(fd, &batch.messages[place], batch.count - place, MSG_DONTWAIT)
    if send(fd, batch.messages[place].msg_hdr.msg_iov.iov_base, batch.bytes[place], MSG_DONTWAIT) < 0:
        return -1
    return 1


cdef inline void send_flush(loop_t *loop, int d) noexcept nogil:
    """Send all messages and count them. Those to clients may be of any session."""
    cdef send_batch_t *batch = loop.send_batch
    cdef uint32_t place = 0, i
    cdef bint retried = False
    cdef int sent
    cdef int fd = loop.listener
    for i in range(batch.count):
        send_headers(batch, i, d)
    while place < batch.count:
        if d == TO_BACKEND:
            fd = batch.sessions[0].fd  # -1 if it could not be connected anew
        sent = send_from(batch, fd, place, d)
        if sent > 0:
            for i in range(place, place + sent):
                loop.tally[SENT_TO_BACKEND + d] += batch.segments[i]
                loop.tally[BYTES_TO_BACKEND + d] += batch.bytes[i]
            loop.tally[MESSAGES_TO_BACKEND + d] += sent
            place += sent
            retried = False
        elif errno == EINTR:
            continue
        elif (errno == ECONNREFUSED or (errno == EMSGSIZE and batch.segments[place] == 1)) and not retried:
            # It may be ICMP's answer to an earlier datagram, and not to this one.
            loop.tally[REFUSED] += errno == ECONNREFUSED
            retried = True
        elif batch.segments[place] > 1 and (errno == EINVAL or errno == EIO or errno == EMSGSIZE):
            loop.tally[GSO_REFUSED] += 1
            batch.sessions[place].gso_max[d] = batch.segment[place]
            send_split(loop, fd, place, d)
            place += 1
        elif d == TO_BACKEND and socket_redial(loop, batch.sessions[place], errno):
            continue
        elif d == TO_CLIENT and send_unbind_source(batch, place, errno):
            continue
        else:
            loop.tally[DROPPED_SEND_TO_BACKEND + d] += batch.segments[place]
            place += 1
            retried = False
    batch.count = batch.iovs = 0


cdef inline void send_flush_if_full(loop_t *loop, int d) noexcept nogil:
    if loop.send_batch.count == SEND_BATCH or loop.send_batch.iovs == SEND_BATCH:
        send_flush(loop, d)


cdef inline void send_add(
    loop_t *loop, session_t *session, int d, void *data, uint32_t length, uint32_t segment
) noexcept nogil:
    """Add datagrams of `segment` bytes (0: a single one), the last maybe shorter. `data` lives until the
    flush."""
    cdef uint32_t segments = 1, start = 0, size
    cdef bint whole = loop.option[GSO] and (session.gso_max[d] == 0 or segment < session.gso_max[d])
    if segment and segment < length:
        segments = (length + segment - 1) // segment
    else:
        segment = length
    if whole and send_join(loop.send_batch, session, data, length, segment, segments):
        send_flush_if_full(loop, d)
    elif segments == 1 or (whole and segments <= MAX_RUN_SEGMENTS and length <= MAX_RUN_BYTES):
        send_append(loop.send_batch, session, data, length, segment, segments)
        send_flush_if_full(loop, d)
    else:
        while start < length:
            size = min(segment, length - start)
            send_append(loop.send_batch, session, <char *>data + start, size, size, 1)
            send_flush_if_full(loop, d)
            start += segment


cdef inline void replies_flush(loop_t *loop) noexcept nogil:
    """Send the replies; their buffers are free again."""
    send_flush(loop, TO_CLIENT)
    loop.receive_batch.used = 0
