/*
 * Threads that open, duplicate, read, write, map, list and close at the same time, some on descriptors that others close.
 * Each thread owns a slot of every file: what it wrote there last is what it must read.
 *
 *     cc threads.c -lpinfold && ./a.out DIR [inline]
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <pinfold.h>

#define THREADS 8
#define FILES 12
#define ROUNDS 400
#define SLOT 3000

static struct pf_volume *volume;

static void die(const char *what)
{
    printf("%s: errno %d; %s\n", what, errno, pf_error_message());
    exit(1);
}

static int mappings;

/* Looks at the thread's slot through a mapping, stores through it, and takes the mapping away in two parts. */
static void map_it(int fd, off_t at, unsigned char last)
{
    size_t length = THREADS * SLOT;
    struct stat st;
    if (pf_fstat(fd, &st) != 0 || st.st_size < at + SLOT)
        die("fstat");
    unsigned char *map = pf_mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        die("mmap");
    for (int i = 0; i < SLOT; i++)
        if (map[at + i] != last)
            die("a mapped byte that somebody else wrote");
    if (pf_pin(map + at, SLOT, 1) != 0)
        die("pin");
    memset(map + at, last, SLOT);
    if (pf_unpin(map + at, SLOT) != 0)
        die("unpin");
    /* A read into its own mapping. */
    if (pf_pread(fd, map + at, SLOT, at) != SLOT)
        die("pread");
    if (last % 4 == 0 && pf_msync(map, 4096, MS_SYNC) != 0)
        die("msync");
    if (pf_munmap(map + 4096, 4096) != 0 || pf_munmap(map, length) != 0)
        die("munmap");
}

static void *work(void *argument)
{
    unsigned me = (unsigned)(size_t)argument, seed = me * 2654435761u + 1;
    unsigned char last[FILES] = {0}, buf[SLOT];
    char name[32];
    for (int round = 1; round <= ROUNDS; round++) {
        seed = seed * 1664525 + 1013904223;
        unsigned which = (seed >> 8) % FILES;
        snprintf(name, sizeof name, "file%u", which);
        int fd = pf_open(volume, name, O_RDWR | O_CREAT, 0644);
        if (fd < 0)
            die("open");
        int copy = pf_dup(fd);
        if (copy < 0)
            die("dup");
        if (pf_close(fd) != 0)
            die("close");
        off_t at = (off_t)me * SLOT;
        if (last[which] != 0) {
            if (pf_pread(copy, buf, SLOT, at) != SLOT)
                die("pread");
            for (int i = 0; i < SLOT; i++)
                if (buf[i] != last[which])
                    die("a byte that somebody else wrote");
        }
        last[which] = (unsigned char)(round % 255 + 1);
        memset(buf, last[which], SLOT);
        if (pf_pwrite(copy, buf, SLOT, at) != SLOT)
            die("pwrite");
        if (round % 64 == 0 && pf_fdatasync(copy) != 0)
            die("fdatasync");
        /* A number that some other thread may be closing: any answer will do but a wrong one's. */
        struct stat st;
        if (pf_fstat(PF_DESCRIPTOR_FIRST + (int)(seed % 32), &st) != 0 && errno != EBADF)
            die("fstat");
        if (round % 16 == 0) {
            struct pf_dir *dir = pf_opendir(volume, "/");
            int count = 0;
            while (dir != NULL && pf_readdir(dir) != NULL)
                count++;
            if (count < 3 || pf_closedir(dir) != 0)
                die("readdir");
        }
        if (round % 8 == 0 && mappings)
            map_it(copy, at, last[which]);
        if (pf_close(copy) != 0)
            die("close");
    }
    return NULL;
}

int main(int argc, char **argv)
{
    struct pf_options options = {.size = sizeof options, .memory = 256 << 10};
    options.flags = argc == 3 ? PF_OPTION_INLINE_FAULTS : 0;
    if (argc < 2 || (volume = pf_volume_open(argv[1], &options)) == NULL)
        die("volume");
    mappings = pf_volume_capabilities(volume) & PF_CAPABILITY_MAPPINGS;
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, (void *)i) != 0)
            die("thread");
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    /* Nothing is left open: else this would be EBUSY, and the lowest number not be free. */
    int fd = pf_open(volume, "file0", O_RDWR | O_CREAT, 0644);
    if (fd != PF_DESCRIPTOR_FIRST || pf_close(fd) != 0)
        die("descriptors are left");
    if (pf_volume_close(volume) != 0)
        die("close");
    printf("threads\n");
    return 0;
}
