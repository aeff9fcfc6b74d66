/*
 * POSIX's own names over Pinfold: an unmodified program, compiled with this header before everything else, uses a
 * volume wherever a path lies in one or a descriptor is Pinfold's, and the system's calls for all the rest.
 *
 *     cc -include pinfold_posix.h program.c -lpinfold
 *     PINFOLD_VOLUMES=/data PINFOLD_MEMORY=64M ./a.out
 *
 * All translation units that pass descriptors or FILEs to each other need it. What it cannot reach: calls that libc makes
 * itself (realpath, nftw, posix_spawn's file actions), select and other calls on descriptors that are not listed here, and
 * what other programs and children of fork do. README.md has the list.
 */
#ifndef PINFOLD_POSIX_H
#define PINFOLD_POSIX_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include "pinfold.h"

#define PF_POSIX static inline __attribute__((unused))

/*
 * Sends a call by path to the volume it lies in or to the system, whose calls are named here before the macros below
 * exist. `ours` finds the place in `at`.
 */
#define PF_POSIX_BY_PATH(dir_fd, path, flags, system, ours)       \
    struct pf_location at;                                        \
    int found = pf_locate(dir_fd, path, flags, &at);              \
    return found < 0 ? -1 : found == 0 ? (system) : (ours)

/* -- Opening and closing ------------------------------------------------------------------------------------------ */

PF_POSIX int pf_posix_openat_mode(int dir_fd, const char *path, int flags, mode_t mode)
{
    int keep = (flags & O_NOFOLLOW) || (flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL);
    PF_POSIX_BY_PATH(dir_fd, path, keep ? AT_SYMLINK_NOFOLLOW : 0, openat(dir_fd, path, flags, mode),
                     pf_openat(at.at, at.path, flags, mode));
}

PF_POSIX mode_t pf_posix_mode(int flags, va_list arguments)
{
    int creates = (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE;
    return creates ? va_arg(arguments, mode_t) : 0;
}

PF_POSIX int pf_posix_open(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = pf_posix_mode(flags, arguments);
    va_end(arguments);
    return pf_posix_openat_mode(AT_FDCWD, path, flags, mode);
}

PF_POSIX int pf_posix_openat(int dir_fd, const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = pf_posix_mode(flags, arguments);
    va_end(arguments);
    return pf_posix_openat_mode(dir_fd, path, flags, mode);
}

PF_POSIX int pf_posix_creat(const char *path, mode_t mode)
{
    return pf_posix_openat_mode(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
}

PF_POSIX int pf_posix_close(int fd)
{
    return pf_is_descriptor(fd) ? pf_close(fd) : close(fd);
}

PF_POSIX int pf_posix_dup(int fd)
{
    return pf_is_descriptor(fd) ? pf_dup(fd) : dup(fd);
}

PF_POSIX int pf_posix_dup2(int fd, int new_fd)
{
    return pf_is_descriptor(fd) ? pf_dup2(fd, new_fd) : dup2(fd, new_fd);
}

PF_POSIX int pf_posix_fcntl(int fd, int command, ...)
{
    va_list arguments;
    va_start(arguments, command);
    /* As libc does: whatever came, or did not, is as wide as this. */
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    return pf_is_descriptor(fd) ? pf_fcntl(fd, command, (ssize_t)argument)
                                : fcntl(fd, command, argument);
}

PF_POSIX int pf_posix_isatty(int fd)
{
    if (!pf_is_descriptor(fd))
        return isatty(fd);
    if (pf_fcntl(fd, F_GETFD, 0) >= 0)
        errno = ENOTTY;
    return 0;
}

/* Makes a file with a new name by the calls above; libc's would open the file past the volume. */
PF_POSIX int pf_posix_mkstemp(char *template)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    size_t length = strlen(template);
    if (length < 6 || strcmp(template + length - 6, "XXXXXX") != 0) {
        errno = EINVAL;
        return -1;
    }
    for (int tries = 0; tries < 1000; tries++) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        unsigned long seed = (unsigned long)now.tv_nsec * 2654435761UL + (unsigned long)getpid()
            + (unsigned long)tries * 40503UL;
        for (char *at = template + length - 6; *at; at++, seed /= sizeof letters - 1)
            *at = letters[seed % (sizeof letters - 1)];
        int fd = pf_posix_openat_mode(AT_FDCWD, template, O_RDWR | O_CREAT | O_EXCL, 0600);
        if (fd >= 0 || errno != EEXIST)
            return fd;
    }
    return -1;
}

/* -- Data --------------------------------------------------------------------------------------------------------- */

PF_POSIX ssize_t pf_posix_read(int fd, void *buf, size_t count)
{
    return pf_is_descriptor(fd) ? pf_read(fd, buf, count) : read(fd, buf, count);
}

PF_POSIX ssize_t pf_posix_write(int fd, const void *buf, size_t count)
{
    return pf_is_descriptor(fd) ? pf_write(fd, buf, count) : write(fd, buf, count);
}

PF_POSIX ssize_t pf_posix_pread(int fd, void *buf, size_t count, off_t offset)
{
    return pf_is_descriptor(fd) ? pf_pread(fd, buf, count, offset) : pread(fd, buf, count, offset);
}

PF_POSIX ssize_t pf_posix_pwrite(int fd, const void *buf, size_t count, off_t offset)
{
    return pf_is_descriptor(fd) ? pf_pwrite(fd, buf, count, offset) : pwrite(fd, buf, count, offset);
}

PF_POSIX ssize_t pf_posix_readv(int fd, const struct iovec *iov, int count)
{
    return pf_is_descriptor(fd) ? pf_readv(fd, iov, count) : readv(fd, iov, count);
}

PF_POSIX ssize_t pf_posix_writev(int fd, const struct iovec *iov, int count)
{
    return pf_is_descriptor(fd) ? pf_writev(fd, iov, count) : writev(fd, iov, count);
}

PF_POSIX ssize_t pf_posix_preadv(int fd, const struct iovec *iov, int count, off_t offset)
{
    return pf_is_descriptor(fd) ? pf_preadv(fd, iov, count, offset) : preadv(fd, iov, count, offset);
}

PF_POSIX ssize_t pf_posix_pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
    return pf_is_descriptor(fd) ? pf_pwritev(fd, iov, count, offset)
                                : pwritev(fd, iov, count, offset);
}

PF_POSIX ssize_t pf_posix_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    return pf_is_descriptor(fd) ? pf_preadv2(fd, iov, count, offset, flags)
                                : preadv2(fd, iov, count, offset, flags);
}

PF_POSIX ssize_t pf_posix_pwritev2(int fd, const struct iovec *iov, int count, off_t offset,
                                   int flags)
{
    return pf_is_descriptor(fd) ? pf_pwritev2(fd, iov, count, offset, flags)
                                : pwritev2(fd, iov, count, offset, flags);
}

PF_POSIX off_t pf_posix_lseek(int fd, off_t offset, int whence)
{
    return pf_is_descriptor(fd) ? pf_lseek(fd, offset, whence) : lseek(fd, offset, whence);
}

PF_POSIX ssize_t pf_posix_copy_file_range(int fd_in, off_t *offset_in, int fd_out,
                                          off_t *offset_out, size_t len, unsigned flags)
{
    int ours = pf_is_descriptor(fd_in) + pf_is_descriptor(fd_out);
    if (ours == 1) {
        errno = EXDEV; /* Programs read and write instead. */
        return -1;
    }
    return ours ? pf_copy_file_range(fd_in, offset_in, fd_out, offset_out, len, flags)
                : copy_file_range(fd_in, offset_in, fd_out, offset_out, len, flags);
}

/* -- Sizes and durability ------------------------------------------------------------------------------------------ */

PF_POSIX int pf_posix_ftruncate(int fd, off_t length)
{
    return pf_is_descriptor(fd) ? pf_ftruncate(fd, length) : ftruncate(fd, length);
}

PF_POSIX int pf_posix_truncate(const char *path, off_t length)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, 0, truncate(path, length),
                     pf_truncate(at.volume, at.path, length));
}

PF_POSIX int pf_posix_fallocate(int fd, int mode, off_t offset, off_t len)
{
    return pf_is_descriptor(fd) ? pf_fallocate(fd, mode, offset, len)
                                : fallocate(fd, mode, offset, len);
}

PF_POSIX int pf_posix_posix_fallocate(int fd, off_t offset, off_t len)
{
    return pf_is_descriptor(fd) ? pf_fallocate_number(fd, offset, len)
                                : posix_fallocate(fd, offset, len);
}

PF_POSIX int pf_posix_posix_fadvise(int fd, off_t offset, off_t len, int advice)
{
    return pf_is_descriptor(fd) ? pf_fadvise(fd, offset, len, advice)
                                : posix_fadvise(fd, offset, len, advice);
}

PF_POSIX int pf_posix_fsync(int fd)
{
    return pf_is_descriptor(fd) ? pf_fsync(fd) : fsync(fd);
}

PF_POSIX int pf_posix_fdatasync(int fd)
{
    return pf_is_descriptor(fd) ? pf_fdatasync(fd) : fdatasync(fd);
}

PF_POSIX int pf_posix_syncfs(int fd)
{
    return pf_is_descriptor(fd) ? pf_syncfs(fd) : syncfs(fd);
}

PF_POSIX int pf_posix_sync_file_range(int fd, off_t offset, off_t nbytes, unsigned flags)
{
    return pf_is_descriptor(fd) ? pf_sync_file_range(fd, offset, nbytes, flags)
                                : sync_file_range(fd, offset, nbytes, flags);
}

/* -- Attributes ---------------------------------------------------------------------------------------------------- */

PF_POSIX int pf_posix_fstat(int fd, struct stat *buf)
{
    return pf_is_descriptor(fd) ? pf_fstat(fd, buf) : fstat(fd, buf);
}

PF_POSIX int pf_posix_fstatat(int dir_fd, const char *path, struct stat *buf, int flags)
{
    if ((flags & AT_EMPTY_PATH) && pf_is_descriptor(dir_fd))
        return pf_fstatat(dir_fd, path, buf, flags);
    PF_POSIX_BY_PATH(dir_fd, path, flags, fstatat(dir_fd, path, buf, flags),
                     pf_fstatat(at.at, at.path, buf, flags));
}

PF_POSIX int pf_posix_stat(const char *path, struct stat *buf)
{
    return pf_posix_fstatat(AT_FDCWD, path, buf, 0);
}

PF_POSIX int pf_posix_lstat(const char *path, struct stat *buf)
{
    return pf_posix_fstatat(AT_FDCWD, path, buf, AT_SYMLINK_NOFOLLOW);
}

PF_POSIX int pf_posix_fstatvfs(int fd, struct statvfs *buf)
{
    return pf_is_descriptor(fd) ? pf_fstatvfs(fd, buf) : fstatvfs(fd, buf);
}

PF_POSIX int pf_posix_statvfs(const char *path, struct statvfs *buf)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, 0, statvfs(path, buf), pf_statvfs(at.volume, at.path, buf));
}

PF_POSIX int pf_posix_fchmod(int fd, mode_t mode)
{
    return pf_is_descriptor(fd) ? pf_fchmod(fd, mode) : fchmod(fd, mode);
}

PF_POSIX int pf_posix_fchmodat(int dir_fd, const char *path, mode_t mode, int flags)
{
    PF_POSIX_BY_PATH(dir_fd, path, flags, fchmodat(dir_fd, path, mode, flags),
                     pf_fchmodat(at.at, at.path, mode, flags));
}

PF_POSIX int pf_posix_chmod(const char *path, mode_t mode)
{
    return pf_posix_fchmodat(AT_FDCWD, path, mode, 0);
}

PF_POSIX int pf_posix_fchown(int fd, uid_t uid, gid_t gid)
{
    return pf_is_descriptor(fd) ? pf_fchown(fd, uid, gid) : fchown(fd, uid, gid);
}

PF_POSIX int pf_posix_fchownat(int dir_fd, const char *path, uid_t uid, gid_t gid, int flags)
{
    PF_POSIX_BY_PATH(dir_fd, path, flags, fchownat(dir_fd, path, uid, gid, flags),
                     pf_fchownat(at.at, at.path, uid, gid, flags));
}

PF_POSIX int pf_posix_chown(const char *path, uid_t uid, gid_t gid)
{
    return pf_posix_fchownat(AT_FDCWD, path, uid, gid, 0);
}

PF_POSIX int pf_posix_lchown(const char *path, uid_t uid, gid_t gid)
{
    return pf_posix_fchownat(AT_FDCWD, path, uid, gid, AT_SYMLINK_NOFOLLOW);
}

PF_POSIX int pf_posix_futimens(int fd, const struct timespec times[2])
{
    return pf_is_descriptor(fd) ? pf_futimens(fd, times) : futimens(fd, times);
}

PF_POSIX int pf_posix_utimensat(int dir_fd, const char *path, const struct timespec times[2],
                                int flags)
{
    PF_POSIX_BY_PATH(dir_fd, path, flags, utimensat(dir_fd, path, times, flags),
                     pf_utimensat(at.at, at.path, times, flags));
}

PF_POSIX int pf_posix_faccessat(int dir_fd, const char *path, int mode, int flags)
{
    PF_POSIX_BY_PATH(dir_fd, path, flags, faccessat(dir_fd, path, mode, flags),
                     pf_faccessat(at.at, at.path, mode, flags));
}

PF_POSIX int pf_posix_access(const char *path, int mode)
{
    return pf_posix_faccessat(AT_FDCWD, path, mode, 0);
}

/* -- Extended attributes ------------------------------------------------------------------------------------------ */

PF_POSIX ssize_t pf_posix_getxattr(const char *path, const char *name, void *value, size_t size)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, 0, getxattr(path, name, value, size),
                     pf_getxattr(at.volume, at.path, name, value, size));
}

PF_POSIX ssize_t pf_posix_lgetxattr(const char *path, const char *name, void *value, size_t size)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, lgetxattr(path, name, value, size),
                     pf_lgetxattr(at.volume, at.path, name, value, size));
}

PF_POSIX ssize_t pf_posix_fgetxattr(int fd, const char *name, void *value, size_t size)
{
    return pf_is_descriptor(fd) ? pf_fgetxattr(fd, name, value, size) : fgetxattr(fd, name, value, size);
}

PF_POSIX int pf_posix_setxattr(const char *path, const char *name, const void *value, size_t size, int flags)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, 0, setxattr(path, name, value, size, flags),
                     pf_setxattr(at.volume, at.path, name, value, size, flags));
}

PF_POSIX int pf_posix_lsetxattr(const char *path, const char *name, const void *value, size_t size, int flags)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, lsetxattr(path, name, value, size, flags),
                     pf_lsetxattr(at.volume, at.path, name, value, size, flags));
}

PF_POSIX int pf_posix_fsetxattr(int fd, const char *name, const void *value, size_t size, int flags)
{
    return pf_is_descriptor(fd) ? pf_fsetxattr(fd, name, value, size, flags) : fsetxattr(fd, name, value, size, flags);
}

PF_POSIX ssize_t pf_posix_listxattr(const char *path, char *list, size_t size)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, 0, listxattr(path, list, size),
                     pf_listxattr(at.volume, at.path, list, size));
}

PF_POSIX ssize_t pf_posix_llistxattr(const char *path, char *list, size_t size)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, llistxattr(path, list, size),
                     pf_llistxattr(at.volume, at.path, list, size));
}

PF_POSIX ssize_t pf_posix_flistxattr(int fd, char *list, size_t size)
{
    return pf_is_descriptor(fd) ? pf_flistxattr(fd, list, size) : flistxattr(fd, list, size);
}

PF_POSIX int pf_posix_removexattr(const char *path, const char *name)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, 0, removexattr(path, name),
                     pf_removexattr(at.volume, at.path, name));
}

PF_POSIX int pf_posix_lremovexattr(const char *path, const char *name)
{
    PF_POSIX_BY_PATH(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, lremovexattr(path, name),
                     pf_lremovexattr(at.volume, at.path, name));
}

PF_POSIX int pf_posix_fremovexattr(int fd, const char *name)
{
    return pf_is_descriptor(fd) ? pf_fremovexattr(fd, name) : fremovexattr(fd, name);
}

/* -- Names --------------------------------------------------------------------------------------------------------- */

PF_POSIX int pf_posix_mkdirat(int dir_fd, const char *path, mode_t mode)
{
    PF_POSIX_BY_PATH(dir_fd, path, AT_SYMLINK_NOFOLLOW, mkdirat(dir_fd, path, mode),
                     pf_mkdirat(at.at, at.path, mode));
}

PF_POSIX int pf_posix_mkdir(const char *path, mode_t mode)
{
    return pf_posix_mkdirat(AT_FDCWD, path, mode);
}

PF_POSIX int pf_posix_unlinkat(int dir_fd, const char *path, int flags)
{
    PF_POSIX_BY_PATH(dir_fd, path, AT_SYMLINK_NOFOLLOW, unlinkat(dir_fd, path, flags),
                     pf_unlinkat(at.at, at.path, flags));
}

PF_POSIX int pf_posix_unlink(const char *path)
{
    return pf_posix_unlinkat(AT_FDCWD, path, 0);
}

PF_POSIX int pf_posix_rmdir(const char *path)
{
    return pf_posix_unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}

PF_POSIX int pf_posix_remove(const char *path)
{
    if (pf_posix_unlink(path) == 0)
        return 0;
    return errno == EISDIR ? pf_posix_rmdir(path) : -1;
}

/* Two paths: of one volume, or of none; else EXDEV, which is what it means. */
#define PF_POSIX_BY_TWO_PATHS(fd1, path1, flags1, fd2, path2, system, ours)       \
    struct pf_location one, two;                                                  \
    int found1 = pf_locate(fd1, path1, flags1, &one);                             \
    int found2 = found1 < 0 ? -1 : pf_locate(fd2, path2, AT_SYMLINK_NOFOLLOW, &two); \
    if (found1 < 0 || found2 < 0)                                                 \
        return -1;                                                                \
    if (found1 != found2) {                                                       \
        errno = EXDEV;                                                            \
        return -1;                                                                \
    }                                                                             \
    return found1 == 0 ? (system) : (ours)

PF_POSIX int pf_posix_renameat2(int old_fd, const char *old_path, int new_fd, const char *new_path,
                                unsigned flags)
{
    PF_POSIX_BY_TWO_PATHS(old_fd, old_path, AT_SYMLINK_NOFOLLOW, new_fd, new_path,
                          renameat2(old_fd, old_path, new_fd, new_path, flags),
                          pf_renameat2(one.at, one.path, two.at, two.path, flags));
}

PF_POSIX int pf_posix_renameat(int old_fd, const char *old_path, int new_fd, const char *new_path)
{
    return pf_posix_renameat2(old_fd, old_path, new_fd, new_path, 0);
}

PF_POSIX int pf_posix_rename(const char *old_path, const char *new_path)
{
    return pf_posix_renameat2(AT_FDCWD, old_path, AT_FDCWD, new_path, 0);
}

PF_POSIX int pf_posix_linkat(int old_fd, const char *old_path, int new_fd, const char *new_path,
                             int flags)
{
    if ((flags & AT_EMPTY_PATH) && pf_is_descriptor(old_fd)) {
        struct pf_location at;
        int found = pf_locate(new_fd, new_path, AT_SYMLINK_NOFOLLOW, &at);
        if (found == 0)
            errno = EXDEV;
        return found <= 0 ? -1 : pf_linkat(old_fd, old_path, at.at, at.path, flags);
    }
    PF_POSIX_BY_TWO_PATHS(old_fd, old_path, (flags & AT_SYMLINK_FOLLOW) ? 0 : AT_SYMLINK_NOFOLLOW,
                          new_fd, new_path, linkat(old_fd, old_path, new_fd, new_path, flags),
                          pf_linkat(one.at, one.path, two.at, two.path, flags));
}

PF_POSIX int pf_posix_link(const char *old_path, const char *new_path)
{
    return pf_posix_linkat(AT_FDCWD, old_path, AT_FDCWD, new_path, 0);
}

PF_POSIX int pf_posix_symlinkat(const char *target, int dir_fd, const char *path)
{
    PF_POSIX_BY_PATH(dir_fd, path, AT_SYMLINK_NOFOLLOW, symlinkat(target, dir_fd, path),
                     pf_symlinkat(target, at.at, at.path));
}

PF_POSIX int pf_posix_symlink(const char *target, const char *path)
{
    return pf_posix_symlinkat(target, AT_FDCWD, path);
}

PF_POSIX ssize_t pf_posix_readlinkat(int dir_fd, const char *path, char *buf, size_t size)
{
    PF_POSIX_BY_PATH(dir_fd, path, AT_SYMLINK_NOFOLLOW, readlinkat(dir_fd, path, buf, size),
                     pf_readlinkat(at.at, at.path, buf, size));
}

PF_POSIX ssize_t pf_posix_readlink(const char *path, char *buf, size_t size)
{
    return pf_posix_readlinkat(AT_FDCWD, path, buf, size);
}

/* -- Directories --------------------------------------------------------------------------------------------------- */

PF_POSIX DIR *pf_posix_opendir(const char *path)
{
    struct pf_location at;
    int found = pf_locate(AT_FDCWD, path, 0, &at);
    if (found < 0)
        return NULL;
    return found ? (DIR *)pf_opendir(at.volume, at.path) : opendir(path);
}

PF_POSIX DIR *pf_posix_fdopendir(int fd)
{
    return pf_is_descriptor(fd) ? (DIR *)pf_fdopendir(fd) : fdopendir(fd);
}

PF_POSIX struct dirent *pf_posix_readdir(DIR *dir)
{
    struct pf_dir *ours = (struct pf_dir *)dir;
    return pf_is_dir(ours) ? pf_readdir(ours) : readdir(dir);
}

PF_POSIX int pf_posix_closedir(DIR *dir)
{
    struct pf_dir *ours = (struct pf_dir *)dir;
    return pf_is_dir(ours) ? pf_closedir(ours) : closedir(dir);
}

PF_POSIX int pf_posix_dirfd(DIR *dir)
{
    struct pf_dir *ours = (struct pf_dir *)dir;
    return pf_is_dir(ours) ? pf_dirfd(ours) : dirfd(dir);
}

PF_POSIX long pf_posix_telldir(DIR *dir)
{
    struct pf_dir *ours = (struct pf_dir *)dir;
    return pf_is_dir(ours) ? pf_telldir(ours) : telldir(dir);
}

PF_POSIX void pf_posix_seekdir(DIR *dir, long position)
{
    struct pf_dir *ours = (struct pf_dir *)dir;
    if (pf_is_dir(ours))
        pf_seekdir(ours, position);
    else
        seekdir(dir, position);
}

PF_POSIX void pf_posix_rewinddir(DIR *dir)
{
    struct pf_dir *ours = (struct pf_dir *)dir;
    if (pf_is_dir(ours))
        pf_rewinddir(ours);
    else
        rewinddir(dir);
}

/* -- Mappings ------------------------------------------------------------------------------------------------------ */

PF_POSIX void *pf_posix_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
{
    return !(flags & MAP_ANONYMOUS) && pf_is_descriptor(fd)
        ? pf_mmap(addr, length, prot, flags, fd, offset)
        : mmap(addr, length, prot, flags, fd, offset);
}

PF_POSIX int pf_posix_munmap(void *addr, size_t length)
{
    return pf_is_mapped(addr, length) ? pf_munmap(addr, length) : munmap(addr, length);
}

PF_POSIX int pf_posix_msync(void *addr, size_t length, int flags)
{
    return pf_is_mapped(addr, length) ? pf_msync(addr, length, flags) : msync(addr, length, flags);
}

PF_POSIX int pf_posix_madvise(void *addr, size_t length, int advice)
{
    return pf_is_mapped(addr, length) ? pf_madvise(addr, length, advice)
                                      : madvise(addr, length, advice);
}

PF_POSIX int pf_posix_posix_madvise(void *addr, size_t length, int advice)
{
    if (!pf_is_mapped(addr, length))
        return posix_madvise(addr, length, advice);
    int before = errno;
    /* As libc: POSIX's DONTNEED throws nothing away, and the other numbers are the same. */
    int failed = advice == POSIX_MADV_DONTNEED ? 0 : pf_madvise(addr, length, advice);
    int number = failed ? errno : 0;
    errno = before;
    return number;
}

PF_POSIX int pf_posix_mincore(void *addr, size_t length, unsigned char *vector)
{
    return pf_is_mapped(addr, length) ? pf_mincore(addr, length, vector)
                                      : mincore(addr, length, vector);
}

PF_POSIX int pf_posix_mprotect(void *addr, size_t length, int prot)
{
    return pf_is_mapped(addr, length) ? pf_mprotect(addr, length, prot)
                                      : mprotect(addr, length, prot);
}

PF_POSIX void *pf_posix_mremap(void *addr, size_t old_length, size_t new_length, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    void *wanted = (flags & MREMAP_FIXED) ? va_arg(arguments, void *) : NULL;
    va_end(arguments);
    if (pf_is_mapped(addr, old_length))
        return pf_mremap(addr, old_length, new_length, flags);
    return mremap(addr, old_length, new_length, flags, wanted);
}

/* -- Streams ------------------------------------------------------------------------------------------------------- */

/* A stream over a descriptor: libc's own, whose buffer is filled and emptied by Pinfold. The cookie is the number. */
PF_POSIX ssize_t pf_posix_stream_read(void *cookie, char *buf, size_t size)
{
    return pf_read((int)(intptr_t)cookie, buf, size);
}

PF_POSIX ssize_t pf_posix_stream_write(void *cookie, const char *buf, size_t size)
{
    ssize_t done = pf_write((int)(intptr_t)cookie, buf, size);
    return done < 0 ? 0 : done; /* 0 is a stream's word for an error. */
}

PF_POSIX int pf_posix_stream_seek(void *cookie, off64_t *offset, int whence)
{
    off_t position = pf_lseek((int)(intptr_t)cookie, *offset, whence);
    if (position < 0)
        return -1;
    *offset = position;
    return 0;
}

PF_POSIX int pf_posix_stream_close(void *cookie)
{
    return pf_close((int)(intptr_t)cookie);
}

PF_POSIX FILE *pf_posix_fdopen(int fd, const char *mode)
{
    if (!pf_is_descriptor(fd))
        return fdopen(fd, mode);
    if (pf_fcntl(fd, F_GETFD, 0) < 0)
        return NULL;
    cookie_io_functions_t calls = {pf_posix_stream_read, pf_posix_stream_write,
                                   pf_posix_stream_seek, pf_posix_stream_close};
    return fopencookie((void *)(intptr_t)fd, mode, calls);
}

PF_POSIX FILE *pf_posix_fopen(const char *path, const char *mode)
{
    struct pf_location at;
    int found = pf_locate(AT_FDCWD, path, strchr(mode, 'x') ? AT_SYMLINK_NOFOLLOW : 0, &at);
    if (found <= 0)
        return found < 0 ? NULL : fopen(path, mode);
    int flags = strchr(mode, '+') ? O_RDWR : *mode == 'r' ? O_RDONLY : O_WRONLY;
    if (*mode != 'r' && *mode != 'w' && *mode != 'a') {
        errno = EINVAL;
        return NULL;
    }
    if (*mode != 'r')
        flags |= O_CREAT | (*mode == 'w' ? O_TRUNC : O_APPEND);
    if (strchr(mode, 'x'))
        flags |= O_EXCL;
    int fd = pf_openat(at.at, at.path, flags, 0666);
    if (fd < 0)
        return NULL;
    FILE *stream = pf_posix_fdopen(fd, mode);
    if (stream == NULL)
        pf_close(fd);
    return stream;
}

/* -- The names ------------------------------------------------------------------------------------------------------ */

/* With arguments, since a structure has the same name. */
#define stat(path, buf) pf_posix_stat(path, buf)
#define statvfs(path, buf) pf_posix_statvfs(path, buf)

/* Without, so that taking a function's address works too. */
#define access pf_posix_access
#define chmod pf_posix_chmod
#define chown pf_posix_chown
#define close pf_posix_close
#define closedir pf_posix_closedir
#define copy_file_range pf_posix_copy_file_range
#define creat pf_posix_creat
#define dirfd pf_posix_dirfd
#define dup pf_posix_dup
#define dup2 pf_posix_dup2
#define faccessat pf_posix_faccessat
#define fallocate pf_posix_fallocate
#define fchmod pf_posix_fchmod
#define fchmodat pf_posix_fchmodat
#define fchown pf_posix_fchown
#define fchownat pf_posix_fchownat
#define fcntl pf_posix_fcntl
#define fdatasync pf_posix_fdatasync
#define fdopen pf_posix_fdopen
#define fdopendir pf_posix_fdopendir
#define fgetxattr pf_posix_fgetxattr
#define flistxattr pf_posix_flistxattr
#define fopen pf_posix_fopen
#define fremovexattr pf_posix_fremovexattr
#define fsetxattr pf_posix_fsetxattr
#define fstat pf_posix_fstat
#define fstatat pf_posix_fstatat
#define fstatvfs pf_posix_fstatvfs
#define fsync pf_posix_fsync
#define ftruncate pf_posix_ftruncate
#define futimens pf_posix_futimens
#define getxattr pf_posix_getxattr
#define isatty pf_posix_isatty
#define lchown pf_posix_lchown
#define lgetxattr pf_posix_lgetxattr
#define link pf_posix_link
#define linkat pf_posix_linkat
#define listxattr pf_posix_listxattr
#define llistxattr pf_posix_llistxattr
#define lremovexattr pf_posix_lremovexattr
#define lseek pf_posix_lseek
#define lsetxattr pf_posix_lsetxattr
#define lstat pf_posix_lstat
#define madvise pf_posix_madvise
#define mincore pf_posix_mincore
#define mkdir pf_posix_mkdir
#define mkdirat pf_posix_mkdirat
#define mkstemp pf_posix_mkstemp
#define mmap pf_posix_mmap
#define mprotect pf_posix_mprotect
#define mremap pf_posix_mremap
#define msync pf_posix_msync
#define munmap pf_posix_munmap
#define open pf_posix_open
#define openat pf_posix_openat
#define opendir pf_posix_opendir
#define posix_fadvise pf_posix_posix_fadvise
#define posix_fallocate pf_posix_posix_fallocate
#define posix_madvise pf_posix_posix_madvise
#define pread pf_posix_pread
#define preadv pf_posix_preadv
#define preadv2 pf_posix_preadv2
#define pwrite pf_posix_pwrite
#define pwritev pf_posix_pwritev
#define pwritev2 pf_posix_pwritev2
#define read pf_posix_read
#define readdir pf_posix_readdir
#define readlink pf_posix_readlink
#define readlinkat pf_posix_readlinkat
#define readv pf_posix_readv
#define remove pf_posix_remove
#define removexattr pf_posix_removexattr
#define rename pf_posix_rename
#define renameat pf_posix_renameat
#define renameat2 pf_posix_renameat2
#define rewinddir pf_posix_rewinddir
#define rmdir pf_posix_rmdir
#define seekdir pf_posix_seekdir
#define setxattr pf_posix_setxattr
#define symlink pf_posix_symlink
#define symlinkat pf_posix_symlinkat
#define sync_file_range pf_posix_sync_file_range
#define syncfs pf_posix_syncfs
#define telldir pf_posix_telldir
#define truncate pf_posix_truncate
#define unlink pf_posix_unlink
#define unlinkat pf_posix_unlinkat
#define utimensat pf_posix_utimensat
#define write pf_posix_write
#define writev pf_posix_writev

/* The names of large-file programs: an off_t has 64 bits here in any case. */
#define creat64 pf_posix_creat
#define fallocate64 pf_posix_fallocate
#define fopen64 pf_posix_fopen
#define ftruncate64 pf_posix_ftruncate
#define lseek64 pf_posix_lseek
#define mmap64 pf_posix_mmap
#define open64 pf_posix_open
#define openat64 pf_posix_openat
#define pread64 pf_posix_pread
#define preadv64 pf_posix_preadv
#define pwrite64 pf_posix_pwrite
#define pwritev64 pf_posix_pwritev
#define truncate64 pf_posix_truncate

#endif /* PINFOLD_POSIX_H */
