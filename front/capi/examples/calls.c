/*
 * Makes every call that Pinfold has a name for and prints what came of it: result, errno, data. It knows POSIX alone, so
 * that it can be compiled against libc and against Pinfold and the two outputs compared.
 *
 *     cc calls.c -o calls && ./calls DIR
 *     cc -include pinfold_posix.h calls.c -lpinfold -o calls && PINFOLD_VOLUMES=DIR ./calls DIR
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Prints a call with its result; errno too if it failed. */
#define SHOW(call)                                                                        \
    do {                                                                                  \
        errno = 0;                                                                        \
        long long result = (long long)(call);                                             \
        printf("%-60s = %lld%s%s\n", #call, result, result < 0 ? " " : "",                \
               result < 0 ? strerrorname_np(errno) : "");                                 \
    } while (0)

/* For calls whose number is not to be compared: only whether it worked. */
#define WORKS(call)                                                                       \
    do {                                                                                  \
        errno = 0;                                                                        \
        long long result = (long long)(call);                                             \
        printf("%-60s %s\n", #call, result >= 0 ? "works" : strerrorname_np(errno));      \
    } while (0)

static void show_missing(const char *what, void *pointer)
{
    int number = errno;
    printf("%s: %s\n", what, pointer ? "found" : strerrorname_np(number));
}

static void show_bytes(const char *what, const char *bytes, size_t count)
{
    printf("%s:", what);
    for (size_t i = 0; i < count; i++)
        printf(bytes[i] >= ' ' && bytes[i] <= '~' ? "%c" : "\\%02x", (unsigned char)bytes[i]);
    printf("\n");
}

static void show_stat(const char *what, const struct stat *st)
{
    printf("%s: mode %o links %ld size %lld uid %u gid %u\n", what, st->st_mode,
           (long)st->st_nlink, (long long)st->st_size, st->st_uid, st->st_gid);
}

static unsigned long long sum(const char *bytes, size_t count)
{
    unsigned long long sum = 14695981039346656037ULL;
    for (size_t i = 0; i < count; i++)
        sum = (sum ^ (unsigned char)bytes[i]) * 1099511628211ULL;
    return sum;
}

/* Two pages, the second of which nobody can touch. */
static char *half_page(void)
{
    char *pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(pages + 4096, 4096, PROT_NONE);
    memset(pages, 'h', 4096);
    return pages;
}

static void *const WILD[] = {NULL, (void *)16, (void *)(intptr_t)-4096,
                             (void *)(uintptr_t)0x8000000000000000ULL};

static void opening(void)
{
    int fd;
    printf("-- opening\n");
    SHOW(open("none", O_RDONLY));
    SHOW(open("", O_RDONLY));
    SHOW(open(NULL, O_RDONLY));
    SHOW(open("none/below", O_RDWR | O_CREAT, 0644));
    SHOW(open("slash/", O_RDWR | O_CREAT, 0644));
    WORKS(fd = open("a", O_RDWR | O_CREAT | O_EXCL, 0640));
    SHOW(open("a", O_RDWR | O_CREAT | O_EXCL, 0640));
    SHOW(open("a/", O_RDONLY));
    SHOW(open("a/below", O_RDONLY));
    SHOW(open("a", O_RDONLY | O_DIRECTORY));
    SHOW(write(fd, "0123456789", 10));
    SHOW(close(fd));
    SHOW(close(fd));
    SHOW(close(-1));
    SHOW(close(1 << 29));
    SHOW(read(fd, NULL, 0));
    WORKS(fd = open("a", O_RDONLY));
    SHOW(write(fd, "x", 1));
    SHOW(ftruncate(fd, 0));
    SHOW(close(fd));
    WORKS(fd = open("a", O_WRONLY | O_TRUNC));
    SHOW(read(fd, (char[1]){0}, 1));
    SHOW(lseek(fd, 0, SEEK_END));
    SHOW(close(fd));
    SHOW(open(".", O_RDWR));
    SHOW(open(".", O_RDWR | O_CREAT, 0644));
    WORKS(fd = open(".", O_RDONLY));
    SHOW(read(fd, (char[1]){0}, 1));
    SHOW(write(fd, "x", 1));
    SHOW(fsync(fd));
    SHOW(ftruncate(fd, 0));
    SHOW(fallocate(fd, 0, 0, 10));
    SHOW(close(fd));
    WORKS(fd = creat("created", 0604));
    SHOW(close(fd));
    char long_name[300];
    memset(long_name, 'n', sizeof long_name - 1);
    long_name[sizeof long_name - 1] = 0;
    SHOW(open(long_name, O_RDWR | O_CREAT, 0644));
    char long_path[5000];
    memset(long_path, '/', sizeof long_path - 1);
    long_path[sizeof long_path - 1] = 0;
    SHOW(open(long_path, O_RDONLY));
    WORKS(fd = open(".", O_TMPFILE | O_RDWR, 0600));
    SHOW(write(fd, "nameless", 8));
    SHOW(linkat(fd, "", AT_FDCWD, "named", AT_EMPTY_PATH));
    SHOW(close(fd));
    SHOW(access("named", F_OK));
    SHOW(open(".", O_TMPFILE | O_RDONLY, 0600));
    char temporary[] = "temporary-XXXXXX";
    WORKS(fd = mkstemp(temporary));
    SHOW(unlink(temporary));
    SHOW(write(fd, "still there", 11));
    SHOW(pread(fd, temporary, 5, 6));
    show_bytes("temporary", temporary, 5);
    SHOW(close(fd));
}

static void moving_bytes(void)
{
    char buf[64] = {0};
    int fd;
    printf("-- reading and writing\n");
    WORKS(fd = open("bytes", O_RDWR | O_CREAT, 0644));
    SHOW(write(fd, "hello, world", 12));
    SHOW(lseek(fd, 7, SEEK_SET));
    SHOW(read(fd, buf, sizeof buf));
    show_bytes("read", buf, 5);
    SHOW(read(fd, buf, sizeof buf));
    SHOW(pwrite(fd, "HELLO", 5, 0));
    SHOW(pread(fd, buf, sizeof buf, 3));
    show_bytes("pread", buf, 9);
    SHOW(pread(fd, buf, 1, -1));
    SHOW(pwrite(fd, buf, 1, -1));
    SHOW(pwrite(fd, "x", 1, INT64_MAX));
    SHOW(pread(fd, buf, 1, INT64_MAX - 1));
    SHOW(lseek(fd, 0, SEEK_CUR));
    SHOW(lseek(fd, -1, SEEK_SET));
    SHOW(lseek(fd, -20, SEEK_CUR));
    SHOW(lseek(fd, -2, SEEK_END));
    SHOW(lseek(fd, 0, 77));
    SHOW(lseek(-1, 0, SEEK_SET));
    SHOW(read(fd, buf, sizeof buf));
    SHOW(read(fd, buf, (size_t)-1));
    SHOW(write(fd, buf, 0));
    SHOW(pwrite(fd, "far", 3, 10000));
    SHOW(pread(fd, buf, 4, 9998));
    show_bytes("hole and data", buf, 4);

    struct iovec out[3] = {{"one ", 4}, {NULL, 0}, {"two", 3}};
    SHOW(lseek(fd, 0, SEEK_SET));
    SHOW(writev(fd, out, 3));
    SHOW(pwritev(fd, out, 3, 100));
    char a[5] = {0}, b[5] = {0};
    struct iovec in[2] = {{a, 4}, {b, 4}};
    SHOW(preadv(fd, in, 2, 100));
    show_bytes("a", a, 4);
    show_bytes("b", b, 4);
    SHOW(lseek(fd, 0, SEEK_SET));
    SHOW(readv(fd, in, 2));
    show_bytes("b", b, 4);
    SHOW(readv(fd, in, -1));
    SHOW(readv(fd, in, 0));
    SHOW(readv(fd, in, 2000));
    SHOW(preadv(fd, in, 2, -5));
    SHOW(preadv2(fd, in, 2, 100, 0));
    SHOW(preadv2(fd, in, 2, -1, 0));
    SHOW(lseek(fd, 0, SEEK_CUR));
    SHOW(preadv2(fd, in, 2, 0, RWF_NOWAIT));
    SHOW(preadv2(fd, in, 2, 0, 0x40000000));
    SHOW(pwritev2(fd, out, 3, 0, RWF_DSYNC));
    SHOW(pwritev2(fd, out, 3, 0, RWF_APPEND));
    SHOW(lseek(fd, 0, SEEK_END));
    struct iovec wild = {buf, (size_t)-1};
    SHOW(readv(fd, &wild, 1));
    SHOW(close(fd));

    printf("-- appending\n");
    WORKS(fd = open("bytes", O_WRONLY | O_APPEND));
    SHOW(write(fd, "!", 1));
    SHOW(lseek(fd, 0, SEEK_CUR));
    SHOW(pwrite(fd, "?", 1, 0));
    SHOW(lseek(fd, 0, SEEK_END));
    SHOW(fcntl(fd, F_GETFL) & (O_ACCMODE | O_APPEND));
    SHOW(fcntl(fd, F_SETFL, 0));
    SHOW(pwrite(fd, "#", 1, 0));
    SHOW(lseek(fd, 0, SEEK_END));
    SHOW(close(fd));
    WORKS(fd = open("bytes", O_RDONLY | O_APPEND));
    SHOW(write(fd, "!", 1));
    SHOW(close(fd));
}

static void bad_buffers(void)
{
    char *half = half_page();
    char buf[16];
    int fd;
    printf("-- bad buffers\n");
    WORKS(fd = open("bad", O_RDWR | O_CREAT, 0644));
    SHOW(write(fd, half + 4000, 200));
    SHOW(lseek(fd, 0, SEEK_END));
    SHOW(pwrite(fd, half, 4096, 0));
    SHOW(pread(fd, half + 4090, 100, 0));
    for (size_t i = 0; i < sizeof WILD / sizeof *WILD; i++) {
        void *wild = WILD[i];
        SHOW(read(fd, wild, 10));
        SHOW(pread(fd, wild, 10, 0));
        SHOW(write(fd, wild, 10));
        if (i < 2) /* Linux looks at an address beyond user space even for nothing. */
            SHOW(pread(fd, wild, 0, 0));
        SHOW(readv(fd, wild, 1));
        SHOW(fstat(fd, wild));
        SHOW(open(wild, O_RDONLY));
        SHOW(unlink(wild));
        SHOW(mkdir(wild, 0755));
        SHOW(rename(wild, "b"));
        SHOW(rename("bad", wild));
        SHOW(readlink(wild, buf, sizeof buf));
    }
    struct iovec mixed[3] = {{buf, 8}, {half + 4096, 8}, {buf, 8}};
    SHOW(preadv(fd, mixed, 3, 0));
    SHOW(pwritev(fd, mixed, 3, 0));
    SHOW(lseek(fd, 0, SEEK_CUR));
    SHOW(close(fd));
    munmap(half, 8192);
}

static void sizes(void)
{
    char buf[8];
    struct stat st;
    int fd;
    printf("-- sizes and ranges\n");
    WORKS(fd = open("sizes", O_RDWR | O_CREAT, 0644));
    SHOW(ftruncate(fd, 100000));
    SHOW(ftruncate(fd, -1));
    SHOW(pwrite(fd, "abcdefgh", 8, 50000));
    SHOW(ftruncate(fd, 50004));
    SHOW(ftruncate(fd, 60000));
    SHOW(pread(fd, buf, 8, 50000));
    show_bytes("cut and grown", buf, 8);
    SHOW(truncate("sizes", 70000));
    SHOW(truncate("none", 0));
    SHOW(truncate(".", 0));
    SHOW(fallocate(fd, 0, 0, 80000));
    SHOW(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 90000));
    SHOW(fallocate(fd, 0, -1, 10));
    SHOW(fallocate(fd, 0, 0, 0));
    SHOW(fallocate(fd, 0x4000, 0, 10));
    SHOW(fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, 10));
    SHOW(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 49000, 1002));
    SHOW(pread(fd, buf, 8, 50000));
    show_bytes("punched", buf, 8);
    SHOW(fstat(fd, &st));
    show_stat("sizes", &st);
    SHOW(posix_fallocate(fd, 0, 81000));
    SHOW(posix_fallocate(-1, 0, 10));
    SHOW(posix_fallocate(fd, 0, 0));
    SHOW(posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL));
    SHOW(posix_fadvise(fd, 0, 0, 99));
    SHOW(fsync(fd));
    SHOW(fdatasync(fd));
    SHOW(fsync(-1));
    SHOW(syncfs(fd));
    SHOW(sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE));
    SHOW(sync_file_range(fd, -1, 0, SYNC_FILE_RANGE_WRITE));
    SHOW(sync_file_range(fd, 0, 0, 0x40));
    SHOW(close(fd));

    printf("-- holes\n");
    WORKS(fd = open("holes", O_RDWR | O_CREAT, 0644));
    SHOW(ftruncate(fd, 1 << 20));
    SHOW(pwrite(fd, "data", 4, 512 << 10));
    SHOW(fsync(fd));
    SHOW(lseek(fd, 0, SEEK_DATA));
    SHOW(lseek(fd, 512 << 10, SEEK_HOLE));
    SHOW(lseek(fd, 0, SEEK_HOLE));
    SHOW(lseek(fd, 1 << 20, SEEK_DATA));
    SHOW(lseek(fd, 1 << 20, SEEK_HOLE));
    SHOW(lseek(fd, 600 << 10, SEEK_DATA));
    SHOW(lseek(fd, -1, SEEK_DATA));
    SHOW(lseek(fd, 0, SEEK_CUR));
    SHOW(close(fd));

    printf("-- copying\n");
    int from, to;
    WORKS(from = open("from", O_RDWR | O_CREAT, 0644));
    WORKS(to = open("to", O_RDWR | O_CREAT, 0644));
    char *big = malloc(3000000);
    for (int i = 0; i < 3000000; i++)
        big[i] = (char)(i * 7 + i / 1000);
    SHOW(write(from, big, 3000000));
    off_t in = 1000, out = 10;
    SHOW(copy_file_range(from, &in, to, &out, 2500000, 0));
    printf("offsets %lld %lld\n", (long long)in, (long long)out);
    SHOW(lseek(from, 0, SEEK_SET));
    SHOW(copy_file_range(from, NULL, to, NULL, 10, 0));
    SHOW(lseek(from, 0, SEEK_CUR));
    SHOW(lseek(to, 0, SEEK_CUR));
    SHOW(copy_file_range(from, NULL, to, NULL, 10, 1));
    in = 0, out = 5;
    SHOW(copy_file_range(from, &in, from, &out, 10, 0));
    in = 3000000;
    SHOW(copy_file_range(from, &in, to, NULL, 10, 0));
    memset(big, 0, 3000000);
    SHOW(pread(to, big, 3000000, 0));
    printf("sum %llx\n", sum(big, 2500010));
    free(big);
    SHOW(close(from));
    SHOW(close(to));

    printf("-- direct\n");
    char *aligned = aligned_alloc(4096, 8192);
    memset(aligned, 'd', 8192);
    WORKS(fd = open("direct", O_RDWR | O_CREAT | O_DIRECT | O_DSYNC, 0644));
    SHOW(pwrite(fd, aligned, 8192, 0));
    SHOW(pwrite(fd, aligned + 1, 100, 3));
    memset(aligned, 0, 8192);
    SHOW(pread(fd, aligned, 8192, 4096));
    show_bytes("direct", aligned, 4);
    SHOW(close(fd));
    free(aligned);
}

static void attributes(void)
{
    struct stat st, other;
    struct statvfs space;
    int fd;
    printf("-- attributes\n");
    umask(022);
    WORKS(fd = open("attr", O_RDWR | O_CREAT, 0666));
    SHOW(write(fd, "12345", 5));
    SHOW(fstat(fd, &st));
    show_stat("fstat", &st);
    SHOW(stat("attr", &other));
    printf("same %d\n", st.st_ino == other.st_ino && st.st_dev == other.st_dev
                            && st.st_mtim.tv_nsec == other.st_mtim.tv_nsec);
    SHOW(stat("none", &st));
    SHOW(stat("attr/", &st));
    SHOW(fstat(-1, &st));
    SHOW(fchmod(fd, 0604));
    SHOW(chmod("attr", 04711));
    SHOW(chmod("none", 0600));
    SHOW(fstat(fd, &st));
    show_stat("chmod", &st);
    SHOW(fchown(fd, (uid_t)-1, (gid_t)-1));
    SHOW(chown("attr", getuid(), getgid()));
    SHOW(lchown("attr", (uid_t)-1, getgid()));
    struct timespec times[2] = {{1000000000, 123456789}, {-5, 999999999}};
    SHOW(futimens(fd, times));
    SHOW(fstat(fd, &st));
    printf("times %lld.%09ld %lld.%09ld\n", (long long)st.st_atim.tv_sec, st.st_atim.tv_nsec,
           (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    times[0].tv_nsec = UTIME_OMIT;
    times[1].tv_sec = 2000000000;
    SHOW(utimensat(AT_FDCWD, "attr", times, 0));
    SHOW(stat("attr", &st));
    printf("times %lld.%09ld %lld.%09ld\n", (long long)st.st_atim.tv_sec, st.st_atim.tv_nsec,
           (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    times[1].tv_nsec = 2000000000;
    SHOW(futimens(fd, times));
    SHOW(futimens(fd, NULL));
    SHOW(access("attr", R_OK | W_OK));
    SHOW(access("attr", 99));
    SHOW(access("none", F_OK));
    SHOW(faccessat(AT_FDCWD, "attr", F_OK, 0));
    SHOW(fstatvfs(fd, &space));
    SHOW(statvfs("attr", &space));
    printf("names up to %lu\n", space.f_namemax);
    SHOW(statvfs("none", &space));
    SHOW(isatty(fd));
    SHOW(close(fd));
}

static void extended_attributes(void)
{
    char buf[100] = {0};
    int fd;
    printf("-- extended attributes\n");
    WORKS(fd = open("attr", O_RDONLY));
    SHOW(setxattr("attr", "user.one", "1234", 4, 0));
    SHOW(fsetxattr(fd, "user.two", "x", 1, XATTR_CREATE));
    SHOW(fsetxattr(fd, "user.two", "y", 1, XATTR_CREATE));
    SHOW(fsetxattr(fd, "user.three", "y", 1, XATTR_REPLACE));
    SHOW(fsetxattr(fd, "user.two", "y", 1, 99));
    SHOW(fsetxattr(fd, "", "y", 1, 0));
    SHOW(setxattr("attr", "user.big", buf, 70000, 0));
    SHOW(fgetxattr(fd, "user.one", NULL, 0));
    SHOW(fgetxattr(fd, "user.one", buf, 2));
    SHOW(getxattr("attr", "user.one", buf, sizeof buf));
    show_bytes("value", buf, 4);
    SHOW(getxattr("attr", "user.none", buf, sizeof buf));
    SHOW(getxattr("none", "user.one", buf, sizeof buf));
    SHOW(lgetxattr("attr", "user.two", buf, sizeof buf));
    SHOW(flistxattr(fd, NULL, 0) >= 18);
    SHOW(listxattr("attr", buf, 3));
    SHOW(llistxattr("attr", buf, sizeof buf) >= 18);
    SHOW(removexattr("attr", "user.one"));
    SHOW(lremovexattr("attr", "user.one"));
    SHOW(fremovexattr(fd, "user.two"));
    SHOW(getxattr("attr", "user.two", buf, sizeof buf));
    SHOW(close(fd));
}

static void names(void)
{
    char buf[100];
    struct stat st;
    int fd;
    printf("-- names\n");
    SHOW(mkdir("dir", 0755));
    SHOW(mkdir("dir", 0755));
    SHOW(mkdir("dir/", 0755));
    SHOW(mkdir("none/dir", 0755));
    SHOW(mkdir(".", 0755));
    SHOW(mkdir("dir/sub/", 0700));
    SHOW(rmdir("dir"));
    SHOW(rmdir("dir/sub/."));
    SHOW(rmdir("attr"));
    SHOW(rmdir("none"));
    SHOW(unlink("dir"));
    SHOW(unlink("attr/"));
    SHOW(unlink("none"));
    SHOW(link("attr", "dir/second"));
    SHOW(link("attr", "dir/second"));
    SHOW(link("dir", "dir2"));
    SHOW(link("none", "third"));
    SHOW(stat("attr", &st));
    printf("links %ld\n", (long)st.st_nlink);
    SHOW(symlink("../attr", "dir/sub/up"));
    SHOW(symlink("sub", "dir/link"));
    SHOW(symlink("loop", "loop"));
    SHOW(symlink("missing", "dangling"));
    SHOW(symlink("", "empty"));
    SHOW(readlink("dir/sub/up", buf, sizeof buf));
    show_bytes("target", buf, 7);
    SHOW(readlink("dir/sub/up", buf, 3));
    SHOW(readlink("attr", buf, sizeof buf));
    SHOW(readlink("dir/link", buf, 0));
    SHOW(stat("dir/link/../second", &st));
    SHOW(stat("dir/link/", &st));
    SHOW(lstat("dir/link", &st));
    show_stat("link", &st);
    SHOW(lstat("dir/link/", &st));
    SHOW(stat("loop", &st));
    SHOW(open("loop", O_RDONLY));
    SHOW(open("dir/link", O_RDONLY | O_NOFOLLOW));
    SHOW(open("dangling", O_RDONLY));
    SHOW(open("dangling", O_RDWR | O_CREAT | O_EXCL, 0644));
    WORKS(fd = open("dangling", O_RDWR | O_CREAT, 0644));
    SHOW(close(fd));
    SHOW(access("missing", F_OK));
    SHOW(rename("missing", "dir/found"));
    SHOW(rename("missing", "dir/found"));
    SHOW(rename("dir/found", "dir/sub"));
    SHOW(rename("dir", "dir/sub/inside"));
    SHOW(rename("dir/sub", "attr"));
    SHOW(rename("attr", "slash/"));
    SHOW(rename("dir/sub/", "moved/"));
    SHOW(rename("dir/.", "x"));
    SHOW(renameat2(AT_FDCWD, "attr", AT_FDCWD, "dir/found", RENAME_NOREPLACE));
    SHOW(renameat2(AT_FDCWD, "attr", AT_FDCWD, "dir/found", RENAME_EXCHANGE));
    SHOW(renameat2(AT_FDCWD, "attr", AT_FDCWD, "dir/found", 0x4000));
    SHOW(remove("loop"));
    SHOW(remove("moved"));
    SHOW(unlink("moved/up"));
    SHOW(remove("moved"));

    printf("-- from a directory\n");
    int at;
    WORKS(at = open("dir", O_RDONLY | O_DIRECTORY));
    WORKS(fd = openat(at, "new", O_RDWR | O_CREAT, 0644));
    SHOW(openat(fd, "below", O_RDONLY));
    SHOW(openat(at, "../attr", O_RDONLY | O_DIRECTORY));
    SHOW(close(fd));
    SHOW(mkdirat(at, "d", 0755));
    SHOW(fstatat(at, "new", &st, 0));
    SHOW(fstatat(at, "", &st, AT_EMPTY_PATH));
    SHOW(S_ISDIR(st.st_mode));
    SHOW(fstatat(at, "", &st, 0));
    SHOW(fstatat(at, "link", &st, AT_SYMLINK_NOFOLLOW));
    SHOW(S_ISLNK(st.st_mode));
    SHOW(symlinkat("t", at, "s"));
    SHOW(readlinkat(at, "s", buf, sizeof buf));
    SHOW(linkat(at, "new", at, "newer", 0));
    SHOW(renameat(at, "newer", AT_FDCWD, "out"));
    SHOW(fchmodat(at, "new", 0600, 0));
    SHOW(fchownat(at, "new", (uid_t)-1, (gid_t)-1, 0));
    SHOW(faccessat(at, "new", R_OK, 0));
    SHOW(utimensat(at, "new", NULL, 0));
    SHOW(unlinkat(at, "new", 0));
    SHOW(unlinkat(at, "d", 0));
    SHOW(unlinkat(at, "d", AT_REMOVEDIR));
    SHOW(unlinkat(at, "d", 0x40000000));
    SHOW(close(at));
}

static void mappings(void)
{
    unsigned char there[8];
    int fd;
    printf("-- mappings\n");
    WORKS(fd = open("mapped", O_RDWR | O_CREAT, 0644));
    SHOW(ftruncate(fd, 10 * 4096 + 100));
    SHOW(pwrite(fd, "written", 7, 4096));
    char *map = mmap(NULL, 10 * 4096 + 100, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    printf("mmap %d\n", map != MAP_FAILED);
    show_bytes("loaded", map + 4096, 7);
    memcpy(map + 2 * 4096, "stored", 6);
    char buf[16] = {0};
    SHOW(pread(fd, buf, 6, 2 * 4096));
    show_bytes("read", buf, 6);
    SHOW(pwrite(fd, "again", 5, 2 * 4096));
    show_bytes("loaded", map + 2 * 4096, 6);
    printf("-- a buffer mapped from the same file\n");
    SHOW(pwrite(fd, map + 4096, 8192, 5 * 4096 + 10));
    SHOW(pread(fd, map + 3 * 4096, 7, 4096));
    show_bytes("loaded", map + 3 * 4096, 7);
    SHOW(pwrite(fd, map, 3 * 4096, 4096));
    printf("sum %llx\n", sum(map, 10 * 4096 + 100));
    SHOW(fstat(fd, (struct stat *)(map + 8 * 4096)));
    SHOW(((struct stat *)(map + 8 * 4096))->st_size);
    memset(map + 8 * 4096, 0, 4096);
    printf("-- private and for reading\n");
    char *private = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 4096);
    printf("mmap %d\n", private != MAP_FAILED);
    memcpy(private, "mine", 4);
    SHOW(pread(fd, buf, 7, 4096));
    printf("the file's is another: %d\n", memcmp(buf, "mine", 4) != 0);
    char *reading = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 8192);
    printf("the same bytes: %d\n", memcmp(reading, map + 8192, 4096) == 0);
    SHOW(munmap(private, 8192));
    SHOW(munmap(reading, 4096));
    printf("-- longer and shorter\n");
    char *moving = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    memcpy(moving + 4096, "copied", 6);
    moving = mremap(moving, 8192, 8 * 4096, MREMAP_MAYMOVE);
    printf("mremap %d\n", moving != MAP_FAILED);
    show_bytes("the copy", moving + 4096, 7);
    printf("the same bytes: %d\n", memcmp(moving + 3 * 4096, map + 3 * 4096, 4096) == 0);
    printf("shorter where it is %d\n", mremap(moving, 8 * 4096, 4096, 0) == moving);
    SHOW(mremap(moving, 4096, 0, MREMAP_MAYMOVE) != MAP_FAILED ? 0 : -1);
    SHOW(mremap(moving + 1, 4096, 8192, MREMAP_MAYMOVE) != MAP_FAILED ? 0 : -1);
    SHOW(mremap(moving, 4096, 8192, 64) != MAP_FAILED ? 0 : -1);
    moving = mremap(moving, 4096, 3 * 4096, MREMAP_MAYMOVE);
    show_bytes("the copy has gone", moving + 4096, 7);
    SHOW(munmap(moving + 8192, 4096));
    moving = mremap(moving, 8192, 5 * 4096, MREMAP_MAYMOVE);
    printf("the same bytes: %d\n", memcmp(moving + 4 * 4096, map + 4 * 4096, 4096) == 0);
    SHOW(munmap(moving, 5 * 4096));
    printf("-- what is refused\n");
    SHOW(mmap(NULL, 0, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED ? 0 : -1);
    SHOW(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 100) != MAP_FAILED ? 0 : -1);
    SHOW(mmap(NULL, 4096, PROT_READ, 0, fd, 0) != MAP_FAILED ? 0 : -1);
    SHOW(mmap(NULL, 4096, PROT_READ, MAP_SHARED, -1, 0) != MAP_FAILED ? 0 : -1);
    int other;
    WORKS(other = open("mapped", O_RDONLY));
    SHOW(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0) != MAP_FAILED ? 0 : -1);
    private = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, other, 0);
    printf("private of what may only be read %d\n", private != MAP_FAILED);
    SHOW(munmap(private, 4096));
    SHOW(close(other));
    WORKS(other = open("mapped", O_WRONLY));
    SHOW(mmap(NULL, 4096, PROT_READ, MAP_SHARED, other, 0) != MAP_FAILED ? 0 : -1);
    SHOW(close(other));
    WORKS(other = open(".", O_RDONLY));
    SHOW(mmap(NULL, 4096, PROT_READ, MAP_SHARED, other, 0) != MAP_FAILED ? 0 : -1);
    SHOW(close(other));
    printf("-- msync, madvise, mincore\n");
    SHOW(msync(map, 10 * 4096 + 100, MS_SYNC));
    SHOW(msync(map, 4096, MS_ASYNC));
    SHOW(msync(map + 1, 4096, MS_SYNC));
    SHOW(msync(map, 4096, MS_SYNC | MS_ASYNC));
    SHOW(msync(map, 4096, 64));
    SHOW(madvise(map, 8 * 4096, MADV_WILLNEED));
    SHOW(madvise(map, 8 * 4096, MADV_RANDOM));
    SHOW(madvise(map, 8 * 4096, MADV_DONTNEED));
    SHOW(madvise(map, 8 * 4096, 12345));
    SHOW(madvise(map + 1, 4096, MADV_NORMAL));
    show_bytes("after DONTNEED", map + 4096, 4);
    SHOW(map[4096 * 2]);
    SHOW(mincore(map + 4096, 2 * 4096, there));
    printf("in memory %d %d\n", there[0] & 1, there[1] & 1);
    SHOW(mincore(map, 4096, NULL));
    SHOW(mincore(map + 1, 4096, there));
    SHOW(mprotect(map, 4096, PROT_READ | PROT_WRITE));
    printf("-- parts\n");
    SHOW(munmap(map + 1, 4096));
    SHOW(munmap(map, 0));
    SHOW(munmap(map + 4 * 4096, 4096));
    SHOW(munmap(map + 4 * 4096, 4096));
    SHOW(msync(map, 8 * 4096, MS_SYNC));
    SHOW(pwrite(fd, map + 4 * 4096 - 10, 20, 0));
    SHOW(write(fd, map + 4 * 4096, 20));
    memcpy(map + 5 * 4096, "after the hole", 14);
    SHOW(munmap(map, 5 * 4096));
    SHOW(close(fd)); /* The mapping lives on. */
    memcpy(map + 6 * 4096, "after close", 11);
    SHOW(munmap(map + 5 * 4096, 5 * 4096 + 100));
    WORKS(fd = open("mapped", O_RDONLY));
    SHOW(pread(fd, buf, 14, 5 * 4096));
    show_bytes("read", buf, 14);
    SHOW(pread(fd, buf, 11, 6 * 4096));
    show_bytes("read", buf, 11);
    SHOW(close(fd));
    char *anonymous = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    SHOW(anonymous[5000]);
    SHOW(madvise(anonymous, 8192, MADV_DONTNEED));
    SHOW(munmap(anonymous, 8192));
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void directories(void)
{
    printf("-- directories\n");
    SHOW(mkdir("many", 0755));
    char name[32];
    for (int i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "many/%d", i);
        int fd = open(name, O_WRONLY | O_CREAT, 0644);
        close(fd);
    }
    DIR *dir = opendir("many");
    printf("opendir %d\n", dir != NULL);
    char *found[1100];
    int count = 0;
    long middle = 0;
    for (struct dirent *entry; (entry = readdir(dir)) != NULL && count < 1100;) {
        if (count == 500)
            middle = telldir(dir);
        found[count++] = strdup(entry->d_name);
    }
    printf("%d entries\n", count);
    seekdir(dir, middle);
    struct dirent *entry = readdir(dir);
    printf("after seekdir the same as before: %d\n", entry && strcmp(entry->d_name, found[501]) == 0);
    rewinddir(dir);
    entry = readdir(dir);
    printf("after rewinddir the first: %d\n", entry && strcmp(entry->d_name, found[0]) == 0);
    struct stat st;
    SHOW(fstat(dirfd(dir), &st));
    SHOW(closedir(dir));
    qsort(found, (size_t)count, sizeof *found, by_name);
    for (int i = 0; i < count; i += 100)
        printf("%s\n", found[i]);
    for (int i = 0; i < count; i++)
        free(found[i]);
    show_missing("opendir of nothing", opendir("none"));
    show_missing("opendir of a file", opendir("bytes"));
    int fd = open("many", O_RDONLY);
    dir = fdopendir(fd);
    printf("fdopendir %d, same descriptor %d\n", dir != NULL, dirfd(dir) == fd);
    SHOW(closedir(dir));
    SHOW(close(fd));
}

static void descriptors(void)
{
    int fd, again, third;
    char buf[8];
    printf("-- descriptors\n");
    WORKS(fd = open("fds", O_RDWR | O_CREAT | O_CLOEXEC, 0644));
    SHOW(write(fd, "abcdef", 6));
    WORKS(again = dup(fd));
    SHOW(lseek(again, 2, SEEK_SET));
    SHOW(read(fd, buf, 2));
    SHOW(lseek(again, 0, SEEK_CUR));
    SHOW(fcntl(fd, F_GETFD));
    SHOW(fcntl(again, F_GETFD));
    SHOW(fcntl(again, F_SETFD, FD_CLOEXEC));
    SHOW(fcntl(again, F_GETFD));
    SHOW(close(fd));
    SHOW(read(again, buf, 8));
    WORKS(third = fcntl(again, F_DUPFD, 3));
    SHOW(dup2(again, third) == third);
    SHOW(dup2(-1, third));
    SHOW(dup(-1));
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    SHOW(fcntl(again, F_SETLK, &lock));
    SHOW(fcntl(third, F_GETLK, &lock));
    SHOW(lock.l_type == F_UNLCK);
    lock.l_type = 77;
    SHOW(fcntl(third, F_SETLK, &lock));
    SHOW(fcntl(third, F_SETLK, NULL));
    SHOW(fcntl(third, 9999, 0));
    SHOW(close(again));
    SHOW(close(third));
    /* The lowest free number is given again. */
    int one = open("fds", O_RDONLY), two = open("fds", O_RDONLY);
    close(one);
    SHOW(open("fds", O_RDONLY) == one);
    SHOW(close(one));
    SHOW(close(two));
}

static void streams(void)
{
    char line[64];
    printf("-- streams\n");
    FILE *file = fopen("stream", "w+");
    printf("fopen %d\n", file != NULL);
    for (int i = 0; i < 2000; i++)
        fprintf(file, "line %d\n", i);
    SHOW(fseek(file, 0, SEEK_SET));
    SHOW(fgets(line, sizeof line, file) != NULL);
    show_bytes("first", line, strlen(line));
    SHOW(fseek(file, -10, SEEK_END));
    SHOW(fread(line, 1, sizeof line, file));
    show_bytes("last", line, 10);
    SHOW(ftell(file));
    SHOW(fclose(file));
    file = fopen("stream", "a");
    SHOW(fputs("more", file) >= 0);
    SHOW(fclose(file));
    struct stat st;
    SHOW(stat("stream", &st));
    show_stat("stream", &st);
    show_missing("fopen of nothing", fopen("none", "r"));
    show_missing("fopen of what is there, exclusively", fopen("stream", "wx"));
    int fd = open("stream", O_RDONLY);
    file = fdopen(fd, "r");
    SHOW(fscanf(file, "line %*d\nline %63s", line));
    show_bytes("scanned", line, strlen(line));
    SHOW(fclose(file));
    SHOW(close(fd));
}

int main(int argc, char **argv)
{
    if (argc != 2 || chdir(argv[1]) != 0) {
        fprintf(stderr, "usage: calls DIR\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    opening();
    moving_bytes();
    bad_buffers();
    sizes();
    attributes();
    extended_attributes();
    names();
    mappings();
    directories();
    descriptors();
    streams();
    printf("-- other files\n");
    WORKS(open("/proc/self/status", O_RDONLY));
    SHOW(link("attr", "/dev/shm/elsewhere"));
    SHOW(write(1, "", 0));
    return 0;
}
