/* One file in every way at once, against bytes in memory: buffered, direct, mapped, by Linux AIO and by io_uring, with
 * plain memory and with the file's own mapping as buffers.
 *
 *   every_way FILE SECONDS SEED PROCESSES
 *
 * Each process has a megabyte of its own; a single one also cuts, grows and punches behind that. Up to eight transfers are
 * under way at once, each in a slice of its own, with a buffer in plain memory or in another slice of the mapping. Needs no
 * library: AIO and io_uring are asked by system call. Ends with 0, 1 with what was wrong, or 77 without FILE's directory
 * being able to open with O_DIRECT. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/falloc.h>
#include <linux/io_uring.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    SLICE = 64 << 10,
    TARGETS = 8,             /* slices that transfers are of; as many behind them are buffers */
    AREA = 2 * TARGETS * SLICE,
    MOST = 2 * AREA,         /* the largest file of a single process */
    NO_DIRECT = 77,
};

enum engine { SYNC, AIO, URING, ENGINES };
static const char *const names[] = {"sync", "aio", "io_uring"};

/* One transfer, and what has to come of it. */
struct job {
    int write, direct;
    char *buf;
    size_t len;
    off_t at;       /* in the file */
    off_t from_map; /* where the buffer is in the file, or -1 */
};

static int buffered, direct;
static char *map;
static off_t base, size; /* of this process's area, and of the file */
static char *model;      /* the bytes from base on */
static char *plain[TARGETS];
static aio_context_t aio;
static uint64_t state;
static char trail[4][200];
static unsigned steps;

static struct {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
} ring = {.fd = -1};

static void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fprintf(stderr, "area %lld, size %lld, step %u: ", (long long)base, (long long)size, steps);
    vfprintf(stderr, format, list);
    fprintf(stderr, "; before that:");
    for (unsigned i = 0; i < 4; i++)
        fprintf(stderr, " [%s]", trail[(steps + 1 + i) % 4]);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t below(uint64_t limit) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % limit;
}

static void fill(char *at, size_t len) {
    uint64_t mark = below(UINT64_MAX);
    for (size_t i = 0; i < len; i++)
        at[i] = (char)((mark >> (i % 8 * 8)) + i / 8);
}

static void same(const char *got, off_t at, size_t len, const char *how) {
    const char *want = model + (at - base);
    if (memcmp(got, want, len) == 0)
        return;
    size_t bad = 0;
    while (got[bad] == want[bad])
        bad++;
    fail("%s of %zu bytes at %lld: byte %lld is %#x, not %#x", how, len, (long long)at, (long long)(at + bad),
         got[bad] & 255, want[bad] & 255);
}

static void start_ring(void) {
    struct io_uring_params p = {0};
    ring.fd = (int)syscall(SYS_io_uring_setup, 2 * TARGETS, &p);
    if (ring.fd < 0)
        return; /* not here: the other engines do its share */
    size_t sq = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    int how = PROT_READ | PROT_WRITE;
    char *sqs = mmap(NULL, sq, how, MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQ_RING);
    char *cqs = mmap(NULL, cq, how, MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_CQ_RING);
    ring.sqes = mmap(NULL, p.sq_entries * sizeof(struct io_uring_sqe), how, MAP_SHARED, ring.fd, IORING_OFF_SQES);
    if (sqs == MAP_FAILED || cqs == MAP_FAILED || ring.sqes == MAP_FAILED)
        fail("the rings of io_uring: %s", strerror(errno));
    ring.sq_tail = (unsigned *)(sqs + p.sq_off.tail), ring.sq_mask = (unsigned *)(sqs + p.sq_off.ring_mask);
    ring.sq_array = (unsigned *)(sqs + p.sq_off.array);
    ring.cq_head = (unsigned *)(cqs + p.cq_off.head), ring.cq_tail = (unsigned *)(cqs + p.cq_off.tail);
    ring.cq_mask = (unsigned *)(cqs + p.cq_off.ring_mask), ring.cqes = (struct io_uring_cqe *)(cqs + p.cq_off.cqes);
}

static void ended(const struct job *job, long moved, enum engine engine) {
    if (moved != (long)job->len)
        fail("%s: %s %s of %zu bytes at %lld, buffer %s: %ld %s", names[engine], job->direct ? "direct" : "buffered",
             job->write ? "write" : "read", job->len, (long long)job->at, job->from_map < 0 ? "plain" : "mapped", moved,
             moved < 0 ? strerror((int)-moved) : "");
}

static void by_calls(const struct job *jobs, int count) {
    for (int i = 0; i < count; i++) {
        const struct job *job = &jobs[i];
        int fd = job->direct ? direct : buffered;
        ssize_t moved = job->write ? pwrite(fd, job->buf, job->len, job->at) : pread(fd, job->buf, job->len, job->at);
        ended(job, moved < 0 ? -errno : moved, SYNC);
    }
}

static void by_aio(const struct job *jobs, int count) {
    struct iocb blocks[TARGETS], *list[TARGETS];
    struct io_event events[TARGETS];
    for (int i = 0; i < count; i++) {
        blocks[i] = (struct iocb){
            .aio_data = (uint64_t)i,
            .aio_lio_opcode = jobs[i].write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
            .aio_fildes = (uint32_t)(jobs[i].direct ? direct : buffered),
            .aio_buf = (uint64_t)(uintptr_t)jobs[i].buf,
            .aio_nbytes = jobs[i].len,
            .aio_offset = jobs[i].at,
        };
        list[i] = &blocks[i];
    }
    for (int sent = 0; sent < count;) {
        long taken = syscall(SYS_io_submit, aio, count - sent, list + sent);
        if (taken <= 0)
            fail("io_submit: %s", strerror(errno));
        sent += (int)taken;
    }
    for (int got = 0; got < count;) {
        long more = syscall(SYS_io_getevents, aio, 1, count - got, events, NULL);
        if (more < 0 && errno != EINTR)
            fail("io_getevents: %s", strerror(errno));
        for (long i = 0; i < more; i++)
            ended(&jobs[events[i].data], (long)events[i].res, AIO);
        got += more > 0 ? (int)more : 0;
    }
}

static void by_ring(const struct job *jobs, int count) {
    unsigned tail = *ring.sq_tail;
    for (int i = 0; i < count; i++, tail++) {
        unsigned slot = tail & *ring.sq_mask;
        ring.sqes[slot] = (struct io_uring_sqe){
            .opcode = jobs[i].write ? IORING_OP_WRITE : IORING_OP_READ,
            .fd = jobs[i].direct ? direct : buffered,
            .off = (uint64_t)jobs[i].at,
            .addr = (uint64_t)(uintptr_t)jobs[i].buf,
            .len = (unsigned)jobs[i].len,
            .user_data = (uint64_t)i,
        };
        ring.sq_array[slot] = slot;
    }
    __atomic_store_n(ring.sq_tail, tail, __ATOMIC_RELEASE);
    int sent = 0, got = 0;
    while (got < count) {
        long taken = syscall(SYS_io_uring_enter, ring.fd, count - sent, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        if (taken < 0 && errno != EINTR)
            fail("io_uring_enter: %s", strerror(errno));
        sent += taken > 0 ? (int)taken : 0;
        unsigned head = *ring.cq_head;
        for (; head != __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE); head++, got++) {
            struct io_uring_cqe *cqe = &ring.cqes[head & *ring.cq_mask];
            ended(&jobs[cqe->user_data], cqe->res, URING);
        }
        __atomic_store_n(ring.cq_head, head, __ATOMIC_RELEASE);
    }
}

/* Several transfers at once: of slices 0 to 7, from and to plain memory or the mapping of slices 8 to 15. */
static void batch(void) {
    enum engine engine = (enum engine)below(ring.fd < 0 ? URING : ENGINES);
    int count = 1 + (int)below(TARGETS), first = (int)below(TARGETS);
    struct job jobs[TARGETS];
    for (int i = 0; i < count; i++) {
        struct job *job = &jobs[i];
        int slice = (first + i) % TARGETS;
        size_t len = 1 + below(below(3) ? SLICE : 3 * PAGE), at = below(SLICE - len + 1), skew = below(PAGE);
        *job = (struct job){.write = below(2), .direct = below(2), .from_map = -1};
        if (job->direct) {
            at -= at % PAGE, len = len < PAGE ? PAGE : len - len % PAGE, skew = 0;
            if (at + len > SLICE)
                at = SLICE - len;
        }
        if (skew + len > SLICE)
            skew = 0;
        job->at = base + slice * SLICE + (off_t)at, job->len = len;
        if (below(3) == 0) {
            job->from_map = base + (TARGETS + slice) * SLICE + (off_t)skew;
            job->buf = map + job->from_map;
        } else {
            job->buf = plain[slice] + skew;
            if (job->write)
                fill(job->buf, len);
        }
    }
    snprintf(trail[steps % 4], sizeof trail[0], "%s: %d from slice %d, the first %s %s %zu at %lld", names[engine], count,
             first, jobs[0].direct ? "direct" : "buffered", jobs[0].write ? "write" : "read", jobs[0].len,
             (long long)jobs[0].at);
    if (engine == SYNC)
        by_calls(jobs, count);
    else if (engine == AIO)
        by_aio(jobs, count);
    else
        by_ring(jobs, count);
    for (int i = 0; i < count; i++) {
        struct job *job = &jobs[i];
        char *file = model + (job->at - base);
        char *memory = job->from_map < 0 ? job->buf : model + (job->from_map - base);
        if (job->write)
            memcpy(file, memory, job->len);
        else if (job->from_map >= 0)
            memcpy(memory, file, job->len);
        else
            same(job->buf, job->at, job->len, names[engine]);
    }
}

/* A load or a store through the mapping, a sync, a look: anywhere in what is ours. */
static void single(int alone) {
    off_t end = alone ? size : base + AREA;
    off_t at = base + (off_t)below((uint64_t)(end - base));
    size_t len = 1 + below(SLICE);
    if (at + (off_t)len > end)
        len = (size_t)(end - at);
    unsigned what = (unsigned)below(alone ? 12 : 8);
    snprintf(trail[steps % 4], sizeof trail[0], "call %u: %zu at %lld", what, len, (long long)at);
    switch (what) {
    case 0: case 1:
        same(map + at, at, len, "load");
        break;
    case 2: case 3:
        fill(map + at, len);
        memcpy(model + (at - base), map + at, len);
        break;
    case 4:
        if (fsync(below(2) ? buffered : direct))
            fail("fsync: %s", strerror(errno));
        break;
    case 5:
        if (msync(map + at - at % PAGE, len, MS_SYNC))
            fail("msync: %s", strerror(errno));
        break;
    case 6:
        posix_fadvise(buffered, at, (off_t)len, below(2) ? POSIX_FADV_DONTNEED : POSIX_FADV_WILLNEED);
        break;
    case 7:
        if (fallocate(buffered, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)len))
            fail("punch: %s", strerror(errno));
        memset(model + (at - base), 0, len);
        break;
    default: {
        /* Never shorter than the area; what is cut off and grown again is zeros. */
        off_t to = AREA + (off_t)below(MOST - AREA + 1);
        if (ftruncate(buffered, to))
            fail("ftruncate: %s", strerror(errno));
        if (to > size)
            memset(model + size, 0, (size_t)(to - size));
        size = to;
        struct stat stat;
        if (fstat(direct, &stat) || stat.st_size != size)
            fail("the size is %lld", (long long)stat.st_size);
    }
    }
}

static void everything(int alone) {
    off_t end = alone ? size : base + AREA;
    for (off_t at = base; at < end; at += SLICE) {
        size_t want = end - at < SLICE ? (size_t)(end - at) : SLICE;
        same(map + at, at, want, "final load");
        if (pread(buffered, plain[0], want, at) != (ssize_t)want)
            fail("final read at %lld: short", (long long)at);
        same(plain[0], at, want, "final read");
        if (pread(direct, plain[0], SLICE, at) < (ssize_t)want)
            fail("final direct read at %lld: short", (long long)at);
        same(plain[0], at, want, "final direct read");
    }
}

static void work(const char *path, int seconds, uint64_t seed, int number, int alone) {
    state = seed * 0x9e3779b97f4a7c15u + (uint64_t)number + 1;
    base = (off_t)number * AREA;
    buffered = open(path, O_RDWR), direct = open(path, O_RDWR | O_DIRECT);
    if (buffered < 0 || direct < 0)
        fail("open: %s", strerror(errno));
    map = mmap(NULL, (size_t)base + MOST, PROT_READ | PROT_WRITE, MAP_SHARED, buffered, 0);
    model = calloc(1, MOST);
    for (int i = 0; i < TARGETS; i++)
        if (posix_memalign((void **)&plain[i], PAGE, SLICE))
            fail("no memory");
    if (map == MAP_FAILED || !model || syscall(SYS_io_setup, TARGETS, &aio))
        fail("mmap or io_setup: %s", strerror(errno));
    start_ring();
    time_t until = time(NULL) + seconds;
    for (steps = 0; steps < 50 || time(NULL) < until; steps++)
        if (below(2))
            batch();
        else
            single(alone);
    everything(alone);
}

int main(int argc, char **argv) {
    if (argc != 5)
        return fprintf(stderr, "usage: %s FILE SECONDS SEED PROCESSES\n", argv[0]), 2;
    int seconds = atoi(argv[2]), processes = atoi(argv[4]), status = 0, end;
    int file = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (file < 0 || ftruncate(file, size = (off_t)processes * AREA))
        return perror(argv[1]), 1;
    close(file);
    if ((file = open(argv[1], O_RDWR | O_DIRECT)) < 0)
        return perror("O_DIRECT"), NO_DIRECT;
    close(file);
    for (int i = 0; i < processes; i++)
        if (fork() == 0) {
            work(argv[1], seconds, strtoull(argv[3], NULL, 10), i, processes == 1);
            exit(0);
        }
    while (wait(&end) > 0)
        status |= end != 0;
    return status;
}
