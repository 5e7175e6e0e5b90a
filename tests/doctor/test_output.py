"""Tests of what ``ringattn doctor`` prints, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from doctor_cases import about, healthy

from ringattn.doctor.diagnosis import diagnose
from ringattn.doctor.diagnosis.examination import Examination
from ringattn.doctor.output import as_json, as_text
from ringattn.doctor.records import RankReport, RankReports


def test_table():
    exam = healthy()
    exam.reports.links[2] = replace(exam.reports.links[2], to_right=2.9e9)
    shown = as_text(exam, diagnose(exam), "float16")
    row = next(line for line in shown.splitlines() if line.startswith("rank 2 (mac2) - rank 0 (mac0)"))
    assert row.split()[-6:] == ["300", "us", "2.900", "3.200", "3.000", "slowest"]
    assert shown.count("slowest") == 1 and "macOS 26.2  Apple M3 Ultra  512 GiB  32 (16 a rank)" in shown
    assert "0,1,2  0.1.0     0.32.4  2.4.6  4.1.2   MPICH 5.0.2  multiple     /venv/bin/python (3.12.1)" in shown
    assert f"from {exam.break_even:,} tokens per rank on (32/8 heads of 128, float16, causal)" in shown
    assert shown.endswith("\n\nnothing is wrong")


def test_table_of_almost_nothing():
    exam = Examination(2, RankReports({1: RankReport()}), exit_status=1, launcher_message="boom")
    assert as_text(exam, diagnose(exam), "float16").splitlines()[0].startswith("error: rank 0: did not start (boom); ")


def test_json():
    exam = healthy()
    about(exam, 1, mlx="0.1")
    report = json.loads(json.dumps(as_json(exam, diagnose(exam), "float16")))
    assert (report["ok"], report["size"], report["hop_gb_s"], report["slowest_link"]) == (False, 3, 3.0, [0, 1])
    assert report["links"][0] == {
        "ranks": [0, 1],
        "latency_us": pytest.approx(300),
        "to_right_gb_s": 3.1,
        "to_left_gb_s": 3.2,
        "both_gb_s": 3.0,
    }
    assert report["ranks"][1]["host"]["mlx"] == "0.1" and report["ranks"][0]["gflop_s"]["attention"] == 17000
    assert report["findings"][0]["fatal"] and report["findings"][0]["where"] == "mlx"
