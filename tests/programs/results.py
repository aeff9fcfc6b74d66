"""What came of each case, shown as it comes and as a table at the end."""

import sys
import time
from dataclasses import dataclass, field

SKIPPED_STATUS = 77


class Skip(Exception):
    """This case cannot run here; the text says why."""


@dataclass
class Results:
    """Rows of case, outcome, figures and reason; the exit status follows from them."""

    began: float = field(default_factory=time.monotonic)
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, case: str, outcome: str, figures: str = "", reason: str = "") -> None:
        """Records one outcome: pass, FAIL, known (a divergence that is explained) or skip."""
        self.rows.append((case, outcome, figures, " ".join(reason.split())))
        print(f"{case:<26} {outcome:<5} {figures:<24} {reason.strip()[:4000]}", flush=True)

    def status(self) -> int:
        """Prints the table and returns the exit status: 1 if anything failed or nothing ran."""
        count = {outcome: sum(row[1] == outcome for row in self.rows) for outcome in ("pass", "FAIL", "known", "skip")}
        print("\n| case | outcome | figures | reason |\n|---|---|---|---|")
        for case, outcome, figures, reason in self.rows:
            print(f"| {case} | {outcome} | {figures} | {reason[:200]} |")
        spent = time.monotonic() - self.began
        print(f"\n{count['pass']} passed, {count['FAIL']} failed, {count['known']} known, {count['skip']} skipped in {spent:.0f} s")
        sys.stdout.flush()
        return 1 if count["FAIL"] or not count["pass"] else 0
