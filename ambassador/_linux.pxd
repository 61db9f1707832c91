"""Externs only: what the relay loops call of Linux and the C library. No code, no names of our own."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.types cimport off_t

cdef extern from "<sys/types.h>" nogil:
    ctypedef unsigned int socklen_t

cdef extern from "<errno.h>" nogil:
    int errno
    enum:
        EINTR, EAGAIN, EINVAL, ENOSYS, EIO, EMSGSIZE, EPERM, ENOBUFS, ENOMEM, EMFILE, ENFILE
        ECONNREFUSED, ECONNRESET, ECONNABORTED, EINPROGRESS, EADDRNOTAVAIL, EPIPE
        ENETDOWN, ENETUNREACH, ENODEV

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    int close_range(unsigned int first, unsigned int last, int flags)
    int dup2(int source, int target)
    int dup3(int source, int target, int flags)
    int fork()
    ssize_t read(int fd, void *buffer, size_t length)

cdef extern from "<sys/wait.h>" nogil:
    int waitpid(int pid, int *status, int options)

cdef extern from "<signal.h>" nogil:
    enum:
        SIGKILL
    int kill(int pid, int signal)

cdef extern from "<poll.h>" nogil:
    enum:
        POLLIN
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *watched, unsigned long count, int timeout)

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_NONBLOCK, O_CLOEXEC, O_RDWR, O_RDONLY, SPLICE_F_NONBLOCK, F_SETPIPE_SZ, F_GETPIPE_SZ, F_SETFL
    int open(const char *path, int flags)
    int fcntl(int fd, int command, ...)
    int pipe2(int fds[2], int flags)
    ssize_t splice(int source, off_t *source_offset, int destination, off_t *destination_offset,
                   size_t length, unsigned int flags)

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
        EPOLLIN, EPOLLPRI, EPOLLOUT, EPOLLRDHUP, EPOLLERR, EPOLLHUP, EPOLLET, EPOLLEXCLUSIVE
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    enum:
        AF_UNSPEC, AF_INET, AF_INET6, SOCK_STREAM, SOCK_DGRAM, SOCK_NONBLOCK, SOCK_CLOEXEC
        SOL_SOCKET, SO_ERROR, SO_LINGER, SO_KEEPALIVE, SO_RCVBUF, SO_SNDBUF
        SHUT_WR, MSG_NOSIGNAL, MSG_MORE, MSG_DONTWAIT, MSG_TRUNC, MSG_CMSG_CLOEXEC, MSG_CTRUNC, SCM_RIGHTS
    ctypedef unsigned short sa_family_t
    struct sockaddr:
        sa_family_t sa_family
    struct linger:
        int l_onoff
        int l_linger
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *header)
    unsigned char *CMSG_DATA(cmsghdr *header)
    size_t CMSG_LEN(size_t length)
    size_t CMSG_SPACE(size_t length)
    int socket(int family, int kind, int protocol)
    int accept4(int fd, sockaddr *address, socklen_t *length, int flags)
    int connect(int fd, const sockaddr *address, socklen_t length)
    int getsockname(int fd, sockaddr *address, socklen_t *length)
    int shutdown(int fd, int how)
    int getsockopt(int fd, int level, int option, void *value, socklen_t *length)
    int setsockopt(int fd, int level, int option, const void *value, socklen_t length)
    ssize_t recv(int fd, void *buffer, size_t length, int flags)
    ssize_t send(int fd, const void *buffer, size_t length, int flags)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int recvmmsg(int fd, mmsghdr *messages, unsigned int count, int flags, void *timeout)
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags)

cdef extern from "<netinet/in.h>" nogil:
    enum:
        IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, IPPROTO_UDP, IP_PKTINFO, IPV6_PKTINFO
        IP_TTL, IPV6_HOPLIMIT, IPV6_UNICAST_HOPS
    struct in_addr:
        uint32_t s_addr
    struct sockaddr_in:
        sa_family_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr_in6:
        sa_family_t sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
        in_addr ipi_addr
    struct in6_pktinfo:
        in6_addr ipi6_addr
        unsigned int ipi6_ifindex
    uint16_t htons(uint16_t value)
    uint16_t ntohs(uint16_t value)

cdef extern from "<netinet/tcp.h>" nogil:
    enum:
        TCP_NODELAY, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_INFO, TCP_CLOSE,
        TCPI_OPT_TIMESTAMPS

cdef extern from "<linux/udp.h>" nogil:
    enum:
        UDP_SEGMENT, UDP_GRO

cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        long tv_nsec
    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *now)

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_SHARED, MAP_ANONYMOUS, MADV_DONTNEED
    void *MAP_FAILED
    void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
