"""PEFT's own common tests, run for UNIPELT."""

import json

import pytest

from benchmarks import peft_suite
from benchmarks.cases import ROOT
from benchmarks.downloads import AssetError

RECORD = ROOT / "results" / "peft_suite.json"


@pytest.mark.slow
def test_peft_s_own_tests_pass_but_for_the_listed_exceptions():
    try:
        outcomes = peft_suite.run(ROOT / peft_suite.DOWNLOADS, lambda case: True)
    except AssetError as error:
        pytest.skip(f"PEFT's source archive is not available: {error}")
    assert not peft_suite.surprises(outcomes)
    assert peft_suite.report(outcomes)["counts"] == json.loads(RECORD.read_text())["counts"]


def test_the_record_has_a_reason_for_every_case_that_did_not_pass():
    record = json.loads(RECORD.read_text())
    cases = {"/".join(case) for case in peft_suite.cases()}
    failed = [case for group in record["exceptions"].values() for case in group]
    assert record["cases"] == len(cases) == sum(record["counts"].values())
    assert record["counts"]["failed"] == len(failed) and set(failed) <= cases
    assert all(peft_suite.reason(case) for case in failed)
    assert set(record["exceptions"]) == {entry.reason for entry in peft_suite.EXCEPTIONS}
