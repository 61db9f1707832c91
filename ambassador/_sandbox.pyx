"""What a worker gives up before it reads a byte of traffic. Compiled for memory, like the rest of a worker.

The steps, in the order in which they must be taken (each needs what a later one gives up):

    no-new-privileges  no program run from here gains anything, were one ever run
    bounding           the bounding and the ambient set of capabilities are emptied
    groups             no supplementary groups
    uid                group NOBODY and a user of the worker's own, if the worker is root
    capabilities       effective, permitted and inheritable sets are emptied
    dumpable           no core file, and no other process of this user may look inside
    seccomp            the filter below: a call that is not on the list is refused

A step counts only if it holds: `steps_that_hold` reads it back from the kernel. So a container that took
something away before us satisfies the step too. If the parent is not root, groups and bounding set cannot be
changed and are not wanted: there is nothing of root's to give up, and a process that can open and execute
nothing has no use for either.

Why each worker has a user of its own: the kernel counts pipes (64 MB, fs.pipe-user-pages-soft) and epoll
watches by user. As one user all workers would share one account, and a client that fills one worker's pipes
would slow down the others. (120 bulk streams over two workers: 0.26 s of processor per GB with pipes of 1
MiB; 0.44 s as one user, which copies past the limit.) Nor can one such user signal another. The number is
drawn at random from those that no distribution assigns: a number made of the pid would be the same in every
container of a host, and their kernel is one. A user namespace without such numbers (rootless containers have
65536) leaves NOBODY.

The listener is one open file, shared with the parent and with every successor. So calls that would change it
for good (shutdown, connect, setsockopt) are refused on its number. The number is never given to another
socket (_worker.pyx).

Why the filter is written by hand: it is a constant table in this module's read-only pages, shared by all
workers. libseccomp (with pyseccomp, ctypes) would bring two libraries into the fork server and build the same
program on the heap, for one listing of names. The macros count the jumps.

Sources: seccomp(2), Documentation/userspace-api/seccomp_filter.rst, capabilities(7), prctl(2),
credentials(7).
"""

from libc.stdint cimport uint64_t

from ambassador._counters cimport COUNTER_SANDBOX, counters_map, counters_unmap
from ambassador._linux cimport errno

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <grp.h>
    #include <linux/audit.h>
    #include <linux/capability.h>
    #include <linux/filter.h>
    #include <linux/futex.h>
    #include <linux/seccomp.h>
    #include <linux/udp.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <stddef.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/random.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* ------------------------------------------------------------------------------ the filter

       A call that is on no list is refused (EPERM) rather than fatal: a C library that tries something
       new falls back, and -1, which is what a debugger's fault injection makes of a number, is harmless.
       Fatal is a call that no relay makes and only foreign code would: see FATAL.

       The numbers of x32 are those of x86-64 with bit 30 set. They equal nothing below, so they are
       refused. Calls of another architecture (int 0x80) carry its AUDIT_ARCH and are fatal.

       Arguments are compared in their lower halves, which is all that the kernel reads of these (int and
       unsigned int), or the half with the bit that matters (prot). */

    #if defined(__x86_64__) && !defined(__ILP32__)
    #define OUR_ARCH AUDIT_ARCH_X86_64
    #elif defined(__aarch64__) && defined(__AARCH64EL__) && !defined(__ILP32__)
    #define OUR_ARCH AUDIT_ARCH_AARCH64
    #endif

    #ifndef SECCOMP_RET_KILL_PROCESS
    #define SECCOMP_RET_KILL_PROCESS 0x80000000U
    #endif
    #ifndef SECCOMP_FILTER_FLAG_SPEC_ALLOW
    #define SECCOMP_FILTER_FLAG_SPEC_ALLOW (1UL << 2)
    #endif

    #ifdef OUR_ARCH
    #define COUNT(...) \\
        (sizeof((struct sock_filter[]){__VA_ARGS__}) / sizeof(struct sock_filter))
    #define FIELD(name) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, name))
    #define ARGUMENT(n) FIELD(args[n])
    #define KEEP(bits) BPF_STMT(BPF_ALU | BPF_AND | BPF_K, (unsigned int) (bits))
    #define VERDICT(action) BPF_STMT(BPF_RET | BPF_K, (action))
    #define ALLOWED VERDICT(SECCOMP_RET_ALLOW)
    #define REFUSED VERDICT(SECCOMP_RET_ERRNO | EPERM)
    #define DEATH VERDICT(SECCOMP_RET_KILL_PROCESS)
    /* If what was loaded is `value`, go on with these; else behind them. */
    #define WHEN(value, ...) \\
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, COUNT(__VA_ARGS__)), __VA_ARGS__
    #define ANY_OF_1(a) WHEN(a, ALLOWED)
    #define ANY_OF_2(a, b) ANY_OF_1(a), ANY_OF_1(b)
    #define ANY_OF_4(a, b, c, d) ANY_OF_2(a, b), ANY_OF_2(c, d)
    #define CALL(name, ...) WHEN(__NR_##name, __VA_ARGS__)
    #define ALLOW(name) CALL(name, ALLOWED)
    #define FATAL(name) CALL(name, DEATH)
    #define LISTENER 3  /* FIRST_PASSED of _forkserver.pyx */
    #define NOT_THE_LISTENER ARGUMENT(0), WHEN(LISTENER, REFUSED)

    /* Behind the check of the family: a plain TCP or UDP socket, nothing raw and no other protocol. */
    #define SOCKET_OF_TCP_OR_UDP \\
        ARGUMENT(1), KEEP(~(SOCK_NONBLOCK | SOCK_CLOEXEC)), \\
        WHEN(SOCK_STREAM, ARGUMENT(2), ANY_OF_2(0, IPPROTO_TCP), REFUSED), \\
        WHEN(SOCK_DGRAM, ARGUMENT(2), ANY_OF_2(0, IPPROTO_UDP), REFUSED), \\
        REFUSED

    static const struct sock_filter ambassador_filter[] = {
        FIELD(arch),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OUR_ARCH, 1, 0), DEATH,
        FIELD(nr),

        /* Calls that move bytes. Kernels since 5.11 remember calls that are allowed with any arguments
           and do not run the filter for them; for older ones these come first. */
        ALLOW(recvfrom), ALLOW(sendto), ALLOW(splice), ALLOW(recvmmsg), ALLOW(sendmmsg),
    #ifdef __NR_epoll_wait
        ALLOW(epoll_wait),
    #endif
        ALLOW(epoll_pwait), ALLOW(epoll_ctl), ALLOW(accept4), ALLOW(close),
        ALLOW(recvmsg), ALLOW(sendmsg),
        ALLOW(getsockname),  /* of its own sockets: _own.pxd */
        CALL(connect, NOT_THE_LISTENER, ALLOWED),
        CALL(shutdown, NOT_THE_LISTENER, ALLOWED),
        ALLOW(epoll_create1),  /* once, when the loop is made */
        CALL(socket,
             ARGUMENT(0),
             WHEN(AF_INET, SOCKET_OF_TCP_OR_UDP),
             WHEN(AF_INET6, SOCKET_OF_TCP_OR_UDP),
             REFUSED),
        /* Exactly the options that the loops set: behind others are packet filters, kernel TLS, netfilter
           tables. tests/relay/test_sandbox.py compares this with the loops' sources. */
        CALL(setsockopt,
             NOT_THE_LISTENER,
             ARGUMENT(1),
             WHEN(SOL_SOCKET,
                  ARGUMENT(2), ANY_OF_4(SO_LINGER, SO_KEEPALIVE, SO_RCVBUF, SO_SNDBUF), REFUSED),
             WHEN(IPPROTO_TCP,
                  ARGUMENT(2), ANY_OF_4(TCP_NODELAY, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT), REFUSED),
             WHEN(IPPROTO_UDP,
                  ARGUMENT(2), ANY_OF_2(UDP_GRO, UDP_SEGMENT), REFUSED),
             WHEN(IPPROTO_IP, ARGUMENT(2), ANY_OF_1(IP_TTL), REFUSED),
             WHEN(IPPROTO_IPV6, ARGUMENT(2), ANY_OF_1(IPV6_UNICAST_HOPS), REFUSED),
             REFUSED),
        CALL(getsockopt,
             ARGUMENT(1),
             WHEN(SOL_SOCKET, ARGUMENT(2), ANY_OF_1(SO_ERROR), REFUSED),
             WHEN(IPPROTO_TCP, ARGUMENT(2), ANY_OF_1(TCP_INFO), REFUSED),
             REFUSED),
        CALL(pipe2,  /* no O_NOTIFICATION_PIPE */
             ARGUMENT(1), WHEN(O_NONBLOCK | O_CLOEXEC, ALLOWED), REFUSED),
        CALL(fcntl,
             ARGUMENT(1), ANY_OF_2(F_SETPIPE_SZ, F_GETPIPE_SZ), REFUSED),

        CALL(dup3,  /* standard error becomes /dev/null */
             ARGUMENT(0), WHEN(1, ARGUMENT(1), WHEN(2, ALLOWED), REFUSED), REFUSED),

        /* For the Python around the loops: its pipe and standard error, memory, time, exit. */
        ALLOW(read), ALLOW(write), ALLOW(munmap), ALLOW(brk), ALLOW(madvise), ALLOW(mremap),
        CALL(mmap,  /* memory is never executable: injected code cannot run */
             ARGUMENT(2), KEEP(PROT_EXEC), WHEN(0, ALLOWED), REFUSED),
        CALL(mprotect,
             ARGUMENT(2), KEEP(PROT_EXEC), WHEN(0, ALLOWED), REFUSED),
        ALLOW(clock_gettime), ALLOW(gettimeofday), ALLOW(getrandom), ALLOW(getpid),
        CALL(futex,  /* waiting and waking; requeueing and priorities have had too many holes */
             ARGUMENT(1), KEEP(~(FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME)),
             ANY_OF_4(FUTEX_WAIT, FUTEX_WAKE, FUTEX_WAIT_BITSET, FUTEX_WAKE_BITSET), REFUSED),
        CALL(prctl,  /* the process title */
             ARGUMENT(0), WHEN(PR_SET_NAME, ALLOWED), REFUSED),
        ALLOW(rt_sigreturn), ALLOW(restart_syscall), ALLOW(rt_sigaction), ALLOW(rt_sigprocmask),
        ALLOW(exit), ALLOW(exit_group),

        /* Only an intruder's: other programs, other processes, the kernel's larger doors. */
        FATAL(execve), FATAL(execveat), FATAL(clone),
    #ifdef __NR_fork
        FATAL(fork), FATAL(vfork),
    #endif
    #ifdef __NR_clone3
        FATAL(clone3),
    #endif
        FATAL(ptrace), FATAL(process_vm_readv), FATAL(process_vm_writev),
        FATAL(unshare), FATAL(setns), FATAL(mount), FATAL(umount2), FATAL(pivot_root), FATAL(chroot),
        FATAL(bpf), FATAL(perf_event_open), FATAL(userfaultfd),
    #ifdef __NR_io_uring_setup
        FATAL(io_uring_setup), FATAL(io_uring_enter), FATAL(io_uring_register),
    #endif
        FATAL(add_key), FATAL(request_key), FATAL(keyctl),
        FATAL(init_module), FATAL(finit_module), FATAL(delete_module), FATAL(kexec_load),
        FATAL(open_by_handle_at),
        REFUSED,
    };

    static int ambassador_filter_install(void) {
        struct sock_fprog program = {
            sizeof(ambassador_filter) / sizeof(*ambassador_filter),
            (struct sock_filter *) ambassador_filter
        };
        /* SPEC_ALLOW: before 5.16 a filter also turned on a guard against speculation *within* a process
           (SSBD), which is for those that run strangers' code, and costs the loops a tenth. */
        if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) == 0)
            return 0;
        return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0);
    }
    #else
    static int ambassador_filter_install(void) {
        return -1;  /* nobody has tried the table on this architecture */
    }
    #endif

    /* ------------------------------------------------------------------------------ capabilities */

    static unsigned int ambassador_random(void) {
        unsigned int number;
        if (getrandom(&number, sizeof(number), GRND_NONBLOCK) != sizeof(number))
            number = (unsigned int) getpid();
        return number;
    }

    static int ambassador_capabilities_get(struct __user_cap_data_struct *sets) {
        struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
        return (int) syscall(SYS_capget, &header, sets);
    }

    static int ambassador_capabilities_drop(void) {
        struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct none[2] = {{0, 0, 0}, {0, 0, 0}};
        return (int) syscall(SYS_capset, &header, none);
    }
    """
    enum:
        CAP_KILL, PR_CAPBSET_DROP, PR_CAPBSET_READ, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL
        PR_GET_DUMPABLE, PR_GET_NO_NEW_PRIVS, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS
    ctypedef unsigned int uid_t
    ctypedef unsigned int gid_t
    struct capability_set "__user_cap_data_struct":
        unsigned int effective
        unsigned int permitted
        unsigned int inheritable
    int prctl(int option, ...) nogil
    unsigned int random_number "ambassador_random" () nogil
    uid_t geteuid() nogil
    int getresuid(uid_t *real, uid_t *effective, uid_t *saved) nogil
    int setresuid(uid_t real, uid_t effective, uid_t saved) nogil
    int setresgid(gid_t real, gid_t effective, gid_t saved) nogil
    int getgroups(int count, gid_t *groups) nogil
    int setgroups(size_t count, const gid_t *groups) nogil
    int capabilities_get "ambassador_capabilities_get" (capability_set *sets) nogil
    int capabilities_drop "ambassador_capabilities_drop" () nogil
    int filter_install "ambassador_filter_install" () nogil

cdef enum:
    NOBODY = 65534
    OWN_USERS = 0x70000000  # up to 0x7fffffff are unassigned: systemd's UIDS-GIDS.md
    OWN_USERS_MASK = 0x0fffffff
    CAPABILITIES = 64  # as many as two words can name; the kernel knows fewer

cdef enum:  # the steps, as bits of the word in the counters page
    NO_NEW_PRIVILEGES = 1
    BOUNDING = 2
    GROUPS = 4
    UID = 8
    CAPABILITY_SETS = 16
    NOT_DUMPABLE = 32
    SECCOMP = 64
    ALL_STEPS = 127

cdef enum:  # the word: steps that hold, from MISSING_SHIFT on those that are missing
    MISSING_SHIFT = 8
    ENTERED = 1 << 16  # the word is not 0, whatever holds

STEPS = ("no-new-privileges", "bounding", "groups", "uid", "capabilities", "dumpable", "seccomp")
MISSING = MISSING_SHIFT


cdef bint may_change_user() noexcept nogil:
    """Whether it has CAP_KILL: a parent that is root without it could not kill a worker of another user."""
    cdef capability_set sets[2]
    return capabilities_get(sets) == 0 and sets[0].effective >> CAP_KILL & 1


cdef uint64_t steps_that_hold() noexcept nogil:
    """Return the steps that hold, read back from the kernel. The filter cannot be read back."""
    cdef uint64_t held = 0
    cdef capability_set sets[2]
    cdef uid_t real = 0, effective = 0, saved = 0
    cdef int capability, bounding = 0
    for capability in range(CAPABILITIES):
        bounding |= prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1
    held |= 0 if bounding else BOUNDING
    held |= NO_NEW_PRIVILEGES if prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 else 0
    held |= GROUPS if getgroups(0, NULL) == 0 else 0
    getresuid(&real, &effective, &saved)
    held |= UID if real and effective and saved else 0
    if capabilities_get(sets) == 0 and not (
        sets[0].effective | sets[0].permitted | sets[0].inheritable
        | sets[1].effective | sets[1].permitted | sets[1].inheritable
    ):
        held |= CAPABILITY_SETS
    held |= NOT_DUMPABLE if prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0 else 0
    return held


cdef uint64_t drop_privileges() noexcept nogil:
    """Take every step. Return the word: which hold, and which wanted ones are missing."""
    cdef uint64_t wanted = ALL_STEPS, held
    cdef uid_t user
    cdef int capability
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if geteuid() != 0:
        wanted &= ~<uint64_t>(GROUPS | BOUNDING)
    else:
        for capability in range(CAPABILITIES):
            prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        setgroups(0, NULL)
        if may_change_user():
            if setresgid(NOBODY, NOBODY, NOBODY) < 0:
                pass  # steps_that_hold tells what holds
            user = OWN_USERS | random_number() & OWN_USERS_MASK
            if setresuid(user, user, user) < 0 and setresuid(NOBODY, NOBODY, NOBODY) < 0:
                pass
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    capabilities_drop()
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # after the change of user, which sets it again
    held = steps_that_hold()
    if filter_install() == 0:
        held |= SECCOMP
    return ENTERED | held | (wanted & ~held) << MISSING_SHIFT


def enter(int counters):
    """Drop every privilege, and write into this worker's counters page (a memfd) which steps hold.

    Return the steps that are missing, as bits. There is no way back: the caller has no other thread, and has
    opened all that it will ever open. Raises OSError if the page cannot be mapped.
    """
    cdef uint64_t word
    cdef uint64_t *page = counters_map(counters, True)
    if page == NULL:
        raise OSError(errno, "mmap of the counters page")
    with nogil:
        word = drop_privileges()
    page[COUNTER_SANDBOX] = word
    counters_unmap(page)
    return word >> MISSING_SHIFT & ALL_STEPS
