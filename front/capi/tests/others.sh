#!/usr/bin/env bash
# Compiles two databases that know nothing of Pinfold, LMDB and SQLite, against libc and against pinfold_posix.h, has both do the
# same work, and compares what they print and what they leave behind. Fetches the sources (Debian's, crates.io's), so it is not
# part of the tests that run without a network:
#
#     front/capi/tests/others.sh
set -euo pipefail
capi=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$capi"
cargo build --quiet --release -p pinfold-capi
target=${CARGO_TARGET_DIR:-$(cd ../.. && pwd)/target}
mkdir "$scratch/lib"
ln -s "$target/release/libpinfold.so" "$scratch/lib/libpinfold.so.0"
failed=0

# compile NAME FLAGS… : NAME.libc and NAME.pinfold
compile() {
    local name=$1
    shift
    gcc -O1 -w -std=gnu11 -pthread "$@" -o "$name.libc" -lm
    gcc -O1 -w -std=gnu11 -pthread -Werror=implicit-function-declaration -include "$capi/include/pinfold_posix.h" \
        "$@" -o "$name.pinfold" -L "$target/release" -lpinfold -lm
}

# compare NAME INPUT ARGUMENTS… : runs both in directories of their own
compare() {
    local name=$1 input=$2 side
    shift 2
    for side in libc pinfold; do
        rm -rf "$side"
        mkdir -p "$side/testdb"
        (cd "$side" && PINFOLD_VOLUMES=$PWD PINFOLD_MEMORY=1M LD_LIBRARY_PATH=$scratch/lib \
            timeout 120 "../$name.$side" "$@" <"$input" 2>&1 | sed 's/0x[0-9a-f]*/ADDRESS/g' >"../$side.out")
    done
    # LMDB's lock file holds process ids, and addresses where it is told to keep them.
    if cmp -s libc.out pinfold.out && diff -rq -x lock.mdb libc pinfold >/dev/null; then
        echo "$name: same output ($(wc -l <libc.out) lines), same files"
    else
        echo "$name: DIFFERS"
        failed=1
    fi
}

echo "== LMDB"
mkdir -p "$scratch/lists/partial" "$scratch/lmdb"
echo "deb-src http://deb.debian.org/debian bookworm main" >"$scratch/sources.list"
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$scratch/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$scratch/lists")
cd "$scratch/lmdb"
if "${apt[@]}" update && "${apt[@]}" source --download-only lmdb 2>/dev/null; then
    tar xf lmdb_*.orig.tar.gz --strip-components=3 --wildcards '*/libraries/liblmdb'
    for test in mtest mtest2 mtest3 mtest4 mtest5; do
        # The same numbers both times; once written through the mapping, once by writes. No address is kept in the file.
        sed -i 's/srand(time(NULL))/srand(1)/; s/MDB_FIXEDMAP/FLAGS/' "$test.c"
        for flags in MDB_WRITEMAP 0; do
            compile "$test-$flags" "-DFLAGS=$flags" mdb.c midl.c "$test.c"
            compare "$test-$flags" /dev/null
        done
    done
else
    echo "skipped: Debian's sources cannot be fetched"
fi

echo "== SQLite"
mkdir -p "$scratch/sqlite/src"
cd "$scratch/sqlite"
printf '[package]\nname = "fetch"\nversion = "0.1.0"\n[dependencies]\nlibsqlite3-sys = "0.35"\n[workspace]\n' >Cargo.toml
touch src/lib.rs
if cargo fetch --quiet; then
    source=$(cargo metadata --format-version 1 --offline | grep -o '"manifest_path":"[^"]*libsqlite3-sys[^"]*"' | cut -d'"' -f4)
    source=$(dirname "$source")/sqlite3
    cat >shell.c <<'C'
#include "sqlite3.h"
#include <stdio.h>
static int row(void *unused, int n, char **values, char **names)
{
    for (int i = 0; i < n; i++)
        printf("%s|", values[i] ? values[i] : "NULL");
    printf("\n");
    return 0;
}
int main(void)
{
    sqlite3 *db;
    char line[4096], *error = NULL;
    if (sqlite3_open("a.db", &db) != SQLITE_OK)
        return 1;
    while (fgets(line, sizeof line, stdin))
        if (sqlite3_exec(db, line, row, NULL, &error) != SQLITE_OK)
            printf("error: %s\n", error);
    return sqlite3_close(db);
}
C
    compile shell -DSQLITE_OMIT_LOAD_EXTENSION -I "$source" shell.c "$source/sqlite3.c"
    for mapped in 0 1000000; do
        cat >work.sql <<SQL
PRAGMA mmap_size=$mapped;
PRAGMA cache_size=50;
CREATE TABLE t(id INTEGER PRIMARY KEY, a TEXT, b INT);
WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM s WHERE n<60000) INSERT INTO t SELECT n, hex(n*7919%100003)||'-'||n, n*31%977 FROM s;
CREATE INDEX ib ON t(b);
SELECT count(*), sum(b), max(a) FROM t;
BEGIN; UPDATE t SET b=b+1 WHERE id%3=0; DELETE FROM t WHERE id%7=0; ROLLBACK;
BEGIN; UPDATE t SET a=a||'x' WHERE b<200; DELETE FROM t WHERE id%5=0; COMMIT;
SELECT count(*), sum(b), sum(length(a)) FROM t;
VACUUM;
PRAGMA integrity_check;
ATTACH 'second.db' AS two;
CREATE TABLE two.u AS SELECT b, count(*) c FROM t GROUP BY b;
SELECT sum(c), count(*) FROM two.u;
PRAGMA journal_mode=WAL;
INSERT INTO t SELECT id+1000000, a, b FROM t WHERE id<2000;
PRAGMA wal_checkpoint(TRUNCATE);
PRAGMA integrity_check;
SQL
        compare shell ../work.sql
    done
else
    echo "skipped: crates.io cannot be reached"
fi
exit "$failed"
