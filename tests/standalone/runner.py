"""Runs tests of slapos.core by name, unmodified, in its own environment; a line of JSON each: [name, outcome, seconds, text].

Not imported by our tests: it is a program for another interpreter.
"""

import json
import sys
import time
import unittest


class Result(unittest.TestResult):
    def startTest(self, test):  # noqa: N802 - the name is unittest's
        super().startTest(test)
        self.began, self.outcome, self.text = time.monotonic(), "pass", ""

    def addError(self, test, err):  # noqa: N802
        super().addError(test, err)
        self.outcome, self.text = "error", self.errors[-1][1]

    def addFailure(self, test, err):  # noqa: N802
        super().addFailure(test, err)
        self.outcome, self.text = "fail", self.failures[-1][1]

    def addSkip(self, test, reason):  # noqa: N802
        super().addSkip(test, reason)
        self.outcome, self.text = "skip", reason

    def stopTest(self, test):  # noqa: N802
        super().stopTest(test)
        name = test.id().removeprefix("slapos.tests.test_standalone.")
        seconds = round(time.monotonic() - self.began, 1)
        print(json.dumps([name, self.outcome, seconds, self.text]), flush=True)


if __name__ == "__main__":
    names = [f"slapos.tests.test_standalone.{name}" for name in sys.argv[1:]] or [
        "slapos.tests.test_standalone"
    ]
    unittest.defaultTestLoader.loadTestsFromNames(names).run(Result())
