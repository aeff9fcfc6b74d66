/*
 * What Pinfold has beyond POSIX's calls: volumes, the default one, locations, statistics, messages, forks. Checks itself and
 * prints what it checked.
 *
 *     cc volumes.c -lpinfold && ./a.out DIR1 DIR2
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* mremap's flags */
#endif

#include <errno.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <pinfold.h>

#define CHECK(what)                                                                          \
    do {                                                                                     \
        if (!(what)) {                                                                       \
            printf("line %d: %s is wrong (errno %d; %s)\n", __LINE__, #what, errno,          \
                   pf_error_message());                                                      \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)

#define FAILS(call, number) CHECK((errno = 0, (call) == -1) && errno == (number))

static int has_thread(const char *wanted)
{
    glob_t found;
    int is_there = 0;
    CHECK(glob("/proc/self/task/*/comm", 0, NULL, &found) == 0);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char name[64] = "";
        FILE *file = fopen(found.gl_pathv[i], "r");
        if (file == NULL)
            continue;
        is_there |= fgets(name, sizeof name, file) && strncmp(name, wanted, strlen(wanted)) == 0;
        fclose(file);
    }
    globfree(&found);
    return is_there;
}

static void options(const char *dir)
{
    struct {
        struct pf_options known;
        char newer[8];
    } large = {.known = {.size = sizeof large}};
    CHECK(pf_volume_open(NULL, NULL) == NULL && errno == EFAULT);
    CHECK(pf_volume_open("/nowhere", NULL) == NULL && errno == ENOENT);
    CHECK(strstr(pf_error_message(), "/nowhere") != NULL);
    CHECK(pf_volume_open(dir, (struct pf_options *)16) == NULL && errno == EFAULT);
    struct pf_options bad = {.size = 0};
    CHECK(pf_volume_open(dir, &bad) == NULL && errno == EINVAL);
    bad = (struct pf_options){.size = sizeof bad, .flags = 1u << 31};
    CHECK(pf_volume_open(dir, &bad) == NULL && errno == EINVAL);
    bad = (struct pf_options){.size = sizeof bad, .memory = 4096};
    CHECK(pf_volume_open(dir, &bad) == NULL && errno == EINVAL);
    large.newer[3] = 1;
    CHECK(pf_volume_open(dir, &large.known) == NULL && errno == E2BIG);
    large.newer[3] = 0;
    struct pf_volume *volume = pf_volume_open(dir, &large.known);
    CHECK(volume != NULL);
    CHECK(pf_volume_close(volume) == 0);
    /* No answer takes so long; a thread watches the time from the first transfer on. */
    struct pf_options limited = {.size = sizeof limited, .store_timeout_ms = 1000 * 1000};
    CHECK(!has_thread("pinfold-limit"));
    CHECK((volume = pf_volume_open(dir, &limited)) != NULL);
    int fd = pf_open(volume, "limited", O_RDWR | O_CREAT, 0644);
    CHECK(fd >= 0 && pf_write(fd, "x", 1) == 1 && pf_fsync(fd) == 0 && pf_close(fd) == 0);
    CHECK(has_thread("pinfold-limit"));
    CHECK(pf_unlink(volume, "limited") == 0);
    CHECK(pf_volume_close(volume) == 0);
    printf("options\n");
}

static void handles(struct pf_volume *one, struct pf_volume *two, const char *dir)
{
    int fd, other;
    CHECK(pf_volume_open(dir, NULL) == NULL && errno == EBUSY);
    FAILS(pf_open((struct pf_volume *)1, "a", O_RDONLY, 0), EBADF);
    FAILS(pf_volume_close((struct pf_volume *)dir), EBADF);
    CHECK((fd = pf_open(NULL, "default", O_RDWR | O_CREAT, 0644)) >= PF_DESCRIPTOR_FIRST);
    CHECK(pf_access(one, "default", F_OK) == 0);
    FAILS(pf_access(two, "default", F_OK), ENOENT);
    CHECK(pf_volume_set_default(two) == 0);
    FAILS(pf_access(NULL, "default", F_OK), ENOENT);
    CHECK(pf_volume_set_default(one) == 0);
    FAILS(pf_volume_close(one), EBUSY);
    CHECK(pf_write(fd, "x", 1) == 1);
    /* The system knows nothing of the number. */
    CHECK(write(fd, "x", 1) == -1 && errno == EBADF);
    FAILS(pf_dup2(fd, 1), ENOTSUP);
    int root = pf_volume_root(two);
    CHECK((other = pf_openat(root, "of two", O_RDWR | O_CREAT, 0644)) >= 0);
    CHECK(pf_access(two, "/of two", F_OK) == 0);
    FAILS(pf_renameat2(root, "of two", pf_volume_root(one), "of one", 0), EXDEV);
    FAILS(pf_linkat(root, "of two", pf_volume_root(one), "of one", 0), EXDEV);
    FAILS(pf_read(root, NULL, 0), EBADF);
    FAILS(pf_open(two, "../x", O_RDONLY, 0), EXDEV);
    CHECK(pf_copy_file_range(fd, &(off_t){0}, other, NULL, 10, 0) == 1);
    CHECK(pf_close(fd) == 0 && pf_close(other) == 0);
    FAILS(pf_readdir(NULL) ? 0 : -1, EBADF);
    FAILS(pf_closedir((struct pf_dir *)dir), EBADF);
    printf("handles\n");
}

static void links(struct pf_volume *one, const char *dir1, const char *dir2)
{
    char target[5000];
    snprintf(target, sizeof target, "%s/default", dir1);
    CHECK(pf_symlink(one, target, "absolute") == 0);
    CHECK(pf_access(one, "absolute", F_OK) == 0);
    CHECK(pf_symlink(one, dir2, "elsewhere") == 0);
    FAILS(pf_open(one, "elsewhere/of two", O_RDONLY, 0), EXDEV);
    CHECK(strstr(pf_error_message(), "leaves the volume") != NULL);
    printf("links\n");
}

static void locations(struct pf_volume *one, const char *dir1, const char *dir2)
{
    struct pf_location at;
    char path[5000];
    snprintf(path, sizeof path, "%s/no/../default", dir1);
    CHECK(pf_locate(AT_FDCWD, path, 0, &at) == 0); /* "no" does not exist. */
    snprintf(path, sizeof path, "%s/../%s/new/", dir1, strrchr(dir1, '/') + 1);
    CHECK(pf_locate(AT_FDCWD, path, 0, &at) == 1);
    CHECK(at.volume == one && strcmp(at.path, "/new/") == 0 && at.at == pf_volume_root(one));
    CHECK(pf_locate(AT_FDCWD, "/proc/self", 0, &at) == 0);
    CHECK(pf_locate(AT_FDCWD, dir2, 0, &at) == 1 && strcmp(at.path, "/") == 0);
    CHECK(chdir(dir1) == 0 && pf_locate(AT_FDCWD, "default", 0, &at) == 1);
    CHECK(strcmp(at.path, "/default") == 0);
    int fd = open(dir1, O_RDONLY);
    CHECK(pf_locate(fd, "default", 0, &at) == 1 && strcmp(at.path, "/default") == 0);
    close(fd);
    FAILS(pf_locate(AT_FDCWD, dir1, 0, NULL), EFAULT);
    FAILS(pf_locate(AT_FDCWD, NULL, 0, &at), EFAULT);
    printf("locations\n");
}

static void statistics(struct pf_volume *one)
{
    struct pf_statistic rows[100];
    ssize_t count = pf_volume_statistics(one, NULL, 0);
    CHECK(count > 4 && count <= 100);
    CHECK(pf_volume_statistics(one, rows, 100) == count);
    int known = 0;
    for (ssize_t i = 0; i < count; i++)
        known += strcmp(rows[i].name, "pages_max") == 0 && rows[i].value >= 64;
    CHECK(known == 1);
    FAILS(pf_volume_statistics(one, NULL, 1), EFAULT);
    printf("statistics\n");
}

static void mappings(struct pf_volume *volume)
{
    int capabilities = pf_volume_capabilities(volume), ends[2];
    CHECK(capabilities >= 0);
    if (!(capabilities & PF_CAPABILITY_MAPPINGS)) {
        printf("mappings\n"); /* There is no userfaultfd here. */
        return;
    }
    int fd = pf_open(volume, "mapped", O_RDWR | O_CREAT, 0644);
    CHECK(fd >= 0 && pf_ftruncate(fd, 20 * 4096) == 0 && pf_pwrite(fd, "abc", 3, 4096) == 3);
    char *map = pf_mmap(NULL, 30 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(map != MAP_FAILED);
    CHECK(pf_is_mapped(map + 100000, 1) && !pf_is_mapped(map + 30 * 4096, 1) && !pf_is_mapped(ends, 8));
    CHECK(pf_mmap(map, 4096, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED && errno == ENOTSUP);

    /* Pinned, it is safe for the system's calls however faults are served. */
    CHECK(pf_pin(map + 4000, 5000, 1) == 0);
    CHECK(pipe(ends) == 0 && write(ends[1], map + 4000, 5000) == 5000);
    CHECK(read(ends[0], map + 4000, 5000) == 5000 && memcmp(map + 4096, "abc", 3) == 0);
    FAILS(pf_munmap(map + 10 * 4096, 4096), EBUSY);
    CHECK(pf_mremap(map, 30 * 4096, 40 * 4096, MREMAP_MAYMOVE) == MAP_FAILED && errno == EBUSY);
    CHECK(pf_mremap(map, 4096, 8192, MREMAP_MAYMOVE) == MAP_FAILED && errno == ENOTSUP);
    FAILS(pf_unpin(map + 4000, 4999), EINVAL);
    CHECK(pf_pin(map + 4000, 5000, 0) == 0 && pf_unpin(map + 4000, 5000) == 0);
    CHECK(pf_unpin(map + 4000, 5000) == 0);
    FAILS(pf_unpin(map + 4000, 5000), EINVAL);
    FAILS(pf_pin(map + 19 * 4096, 8192, 0), EFAULT); /* Beyond the end of the file. */
    FAILS(pf_pin(map, 30 * 4096 + 1, 0), ENOMEM);
    FAILS(pf_pin((void *)ends, 8, 0), ENOMEM);
    FAILS(pf_mprotect(map, 4096, PROT_READ), ENOTSUP);
    FAILS(pf_msync(map, 31 * 4096, MS_SYNC), ENOMEM);

    /* Parts: two mappings of the same file, holes in one. */
    char *again = pf_mmap(NULL, 20 * 4096, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(again != MAP_FAILED && memcmp(again + 4096, "abc", 3) == 0);
    CHECK(pf_munmap(map + 10 * 4096, 4096) == 0 && !pf_is_mapped(map + 10 * 4096, 4096));
    map[9 * 4096] = 'x', map[11 * 4096] = 'y';
    CHECK(again[9 * 4096] == 'x' && again[11 * 4096] == 'y');
    FAILS(pf_volume_close(volume), EBUSY);
    CHECK(pf_pin(map, 4096, 1) == 0); /* Unmapping unpins. */
    FAILS(pf_munmap(map + 11 * 4096, 4096), EBUSY);
    CHECK(pf_munmap(map, 10 * 4096) == 0 && pf_munmap(map, 30 * 4096) == 0);
    CHECK(!pf_is_mapped(map, 30 * 4096) && pf_close(fd) == 0);
    FAILS(pf_volume_close(volume), EBUSY);
    CHECK(again[9 * 4096] == 'x' && pf_munmap(again, 20 * 4096) == 0);
    close(ends[0]);
    close(ends[1]);
    printf("mappings\n");
}

static void fork_is_refused(struct pf_volume *one, const char *dir)
{
    int fd = pf_open(one, "forked", O_RDWR | O_CREAT, 0644);
    void *map = pf_mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    struct pf_dir *listing = pf_opendir(one, "/");
    CHECK(pf_write(fd, "before", 6) == 6);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        char buf[6];
        FAILS(pf_pread(fd, buf, 6, 0), ENOTCONN);
        FAILS(pf_open(one, "forked", O_RDONLY, 0), ENOTCONN);
        CHECK(strstr(pf_error_message(), "forked") != NULL);
        /* What is not in a volume is the system's, here too. */
        struct pf_location at;
        FAILS(pf_locate(AT_FDCWD, dir, 0, &at), ENOTCONN);
        CHECK(pf_locate(AT_FDCWD, "/proc/self", 0, &at) == 0);
        CHECK(pf_is_mapped(map, 4096) == 0 && pf_is_dir(listing) == 1);
        exit(7); /* Runs what was registered for the end of the parent. */
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    char buf[6];
    CHECK(pf_pread(fd, buf, 6, 0) == 6 && memcmp(buf, "before", 6) == 0);
    CHECK(map == MAP_FAILED || pf_munmap(map, 4096) == 0);
    CHECK(pf_closedir(listing) == 0 && pf_fsync(fd) == 0 && pf_close(fd) == 0);
    printf("fork\n");
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    options(argv[1]);
    struct pf_options small = {.size = sizeof small, .memory = 1 << 20};
    struct pf_volume *one = pf_volume_open(argv[1], &small);
    small.flags = PF_OPTION_INLINE_FAULTS;
    struct pf_volume *two = pf_volume_open(argv[2], &small);
    CHECK(one != NULL && two != NULL);
    CHECK(pf_abi_version() == PF_ABI_VERSION);
    handles(one, two, argv[1]);
    links(one, argv[1], argv[2]);
    locations(one, argv[1], argv[2]);
    statistics(one);
    mappings(one);
    mappings(two);
    fork_is_refused(one, argv[1]);
    CHECK(pf_volume_close(one) == 0);
    FAILS(pf_volume_close(one), EBADF);
    CHECK(pf_volume_sync(two) == 0);
    CHECK(pf_access(NULL, "of two", F_OK) == 0); /* The one left is the default now. */
    return 0; /* The end of the process writes the second one back. */
}
