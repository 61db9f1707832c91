"""The fork server's loop: forks a worker on each request, reports starts and exits. Compiled for memory.

The workers forked before and after a write by the fork server do not share the written page. So each worker
pays for whatever the fork server does. In Python this loop touched some 0.7 MB of objects (reference counts)
per turn; here it touches a page of stack.

Messages over the socket pair (SOCK_SEQPACKET, so each arrives whole), in the machine's own byte order:

    request   from the parent   1 byte and descriptors: listener, control pipe, counters, siblings' counters
    forked    to the parent     FORKED, pid, 0 and a pidfd; or FORKED, -errno, 0 and no descriptor
    exited    to the parent     EXITED, pid, wait status

Invariants
----------
- fork(2) is called in a process that has one thread, so the child needs no repair of the interpreter.
- The fork server keeps only the pidfd of a worker, and a worker keeps only its own descriptors.
- When the parent is gone, the fork server kills every child: one that is stopped or stuck would not notice.

Sources: fork(2), pidfd_open(2), unix(7), cmsg(3).
"""

from libc.stdint cimport int32_t
from libc.string cimport memcpy, memset

from ambassador._linux cimport (
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    EINTR,
    EAGAIN,
    EMFILE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_NOSIGNAL,
    O_RDWR,
    POLLIN,
    SCM_RIGHTS,
    SIGKILL,
    SOL_SOCKET,
    close,
    close_range,
    cmsghdr,
    dup2,
    errno,
    fork,
    iovec,
    msghdr,
    open,
    poll,
    pollfd,
    recvmsg,
    sendmsg,
    waitpid,
)
from ambassador._linux cimport kill as send_signal

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    /* glibc 2.36 names it, musl does not. */
    static int ambassador_pidfd_open(int pid, unsigned int flags) {
        return (int) syscall(SYS_pidfd_open, pid, flags);
    }
    static void ambassador_set_errno(int number) {
        errno = number;
    }
    """
    void set_errno "ambassador_set_errno" (int number) nogil
    int pidfd_open "ambassador_pidfd_open" (int pid, unsigned int flags) nogil

cdef enum:
    MIN_PASSED = 3
    MAX_PASSED = 250  # descriptors of a worker; one message carries at most 253 (SCM_MAX_FD, net/scm.h)
    FIRST_PASSED = 3  # behind standard input, output and error; the listener (LISTENER of _sandbox.pyx)
    MAX_CHILDREN = 4096
    CONTROL_BYTES = 64
    REQUEST_BYTES = 1024  # of ancillary data: CMSG_SPACE of MAX_PASSED descriptors, rounded up

cdef enum:
    FORKED = 1
    EXITED = 2

FORKED_MESSAGE = FORKED
EXITED_MESSAGE = EXITED

cdef struct passed_t:  # the descriptors of one request
    int count
    int fds[MAX_PASSED]

cdef struct message_t:
    int32_t kind
    int32_t pid
    int32_t status

# One fork server to a process. Place 0 is the parent's socket; behind it are the children, pid beside pidfd.
cdef pollfd watched[MAX_CHILDREN + 1]
cdef int32_t pids[MAX_CHILDREN + 1]
cdef int watching


cdef int report(int32_t kind, int32_t pid, int32_t status, int pidfd) noexcept:
    """Send the parent a message. 0, or -1 if it is gone."""
    cdef char control[CONTROL_BYTES]
    cdef message_t message
    cdef iovec part
    cdef msghdr header
    cdef cmsghdr *item
    message.kind, message.pid, message.status = kind, pid, status
    part.iov_base, part.iov_len = &message, sizeof(message)
    memset(&header, 0, sizeof(header))
    header.msg_iov, header.msg_iovlen = &part, 1
    if pidfd >= 0:
        memset(control, 0, sizeof(control))
        header.msg_control, header.msg_controllen = control, CMSG_LEN(sizeof(int))
        item = CMSG_FIRSTHDR(&header)
        item.cmsg_level, item.cmsg_type, item.cmsg_len = SOL_SOCKET, SCM_RIGHTS, CMSG_LEN(sizeof(int))
        memcpy(CMSG_DATA(item), &pidfd, sizeof(int))
    while sendmsg(watched[0].fd, &header, MSG_NOSIGNAL) < 0:
        if errno != EINTR:
            return -1
    return 0


cdef void become_worker(passed_t *passed) noexcept:
    """In the child: keep standard error and the passed descriptors, close all else."""
    cdef int place, null
    cdef int above = FIRST_PASSED + passed.count + watching + passed.count
    for place in range(passed.count):  # first above every number that is in use
        passed.fds[place] = dup2(passed.fds[place], above + place)
    for place in range(passed.count):
        passed.fds[place] = dup2(passed.fds[place], FIRST_PASSED + place)
    close_range(FIRST_PASSED + passed.count, ~<unsigned int>0, 0)
    null = open("/dev/null", O_RDWR)
    if null >= 0:
        dup2(null, 0)
        dup2(null, 1)
        close(null)


cdef int fork_worker(passed_t *passed) noexcept:
    """Fork a worker that owns the passed descriptors.

    Return 1 in the child; in the fork server 0, or -1 if the parent is gone.
    """
    cdef int place, pidfd, result, error
    cdef int32_t pid = -1
    set_errno(EAGAIN)
    if watching <= MAX_CHILDREN:
        pid = fork()
    if pid == 0:
        become_worker(passed)
        return 1
    for place in range(passed.count):
        close(passed.fds[place])
    if pid < 0:  # a limit on processes or memory: the parent tries again later
        return report(FORKED, -errno, 0, -1)
    pidfd = pidfd_open(pid, 0)
    if pidfd < 0:  # without one nobody would hear of its exit
        error = errno
        send_signal(pid, SIGKILL)
        waitpid(pid, NULL, 0)
        return report(FORKED, -error, 0, -1)
    result = report(FORKED, pid, 0, pidfd)
    add_child(pidfd, pid)
    return result


cdef void add_child(int pidfd, int32_t pid) noexcept:
    global watching
    watched[watching].fd, watched[watching].events = pidfd, POLLIN
    pids[watching] = pid
    watching += 1


cdef int reap_child(int place) noexcept:
    """Reap the child at `place`, which has exited; the last child takes its place. -1 if the parent is
    gone."""
    global watching
    cdef int status = 0
    cdef int32_t pid = pids[place]
    close(watched[place].fd)
    watching -= 1
    watched[place], pids[place] = watched[watching], pids[watching]
    waitpid(pid, &status, 0)
    return report(EXITED, pid, status, -1)


cdef int receive(passed_t *passed) noexcept:
    """Receive the parent's next request into `passed`.

    Return 1, 0 if the parent is gone, or -1 if not all descriptors could be had: this one is at its limit.
    """
    cdef char control[REQUEST_BYTES]
    cdef char byte
    cdef iovec part
    cdef msghdr header
    cdef cmsghdr *item
    cdef ssize_t got
    cdef int place
    part.iov_base, part.iov_len = &byte, 1
    memset(&header, 0, sizeof(header))
    header.msg_iov, header.msg_iovlen = &part, 1
    header.msg_control, header.msg_controllen = control, sizeof(control)
    got = recvmsg(watched[0].fd, &header, MSG_CMSG_CLOEXEC)
    if got <= 0:
        return 0
    item = CMSG_FIRSTHDR(&header)
    passed.count = 0
    if item != NULL:
        passed.count = min(<int>((item.cmsg_len - CMSG_LEN(0)) // sizeof(int)), <int>MAX_PASSED)
        memcpy(passed.fds, CMSG_DATA(item), passed.count * sizeof(int))
    if passed.count >= MIN_PASSED and not header.msg_flags & MSG_CTRUNC:
        return 1
    for place in range(passed.count):
        close(passed.fds[place])
    return -1


cdef bint serve_requests(passed_t *passed) noexcept:
    """Serve the parent. True in a new worker, False if the parent is gone."""
    cdef int place, received, started
    while True:
        if poll(watched, watching, -1) < 0 and errno != EINTR:
            return False
        place = watching - 1
        while place > 0:  # from the end: reaping moves the last one, which has been checked
            if watched[place].revents and reap_child(place) < 0:
                return False
            place -= 1
        if watched[0].revents:
            watched[0].revents = 0
            received = receive(passed)
            if not received:
                return False
            started = fork_worker(passed) if received > 0 else report(FORKED, -EMFILE, 0, -1)
            if started:
                return started > 0


def serve(int fd):
    """Serve the parent at the other end of socket `fd` until it is gone; then kill every child.

    Return None in the fork server, and in each new worker its descriptors in the order of the request. The
    caller must have no other thread.
    """
    global watching
    cdef passed_t passed
    cdef int place
    watched[0].fd, watched[0].events = fd, POLLIN
    watching = 1
    if serve_requests(&passed):
        return tuple([passed.fds[place] for place in range(passed.count)])
    for place in range(1, watching):
        send_signal(pids[place], SIGKILL)
    return None
