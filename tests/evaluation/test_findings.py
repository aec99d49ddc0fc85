"""Test that sentences in the field's terms follow the numbers."""

from anyflow.evaluation import findings


def test_findings_follow_the_numbers(make_results) -> None:
    good = " ".join(findings(make_results()))
    assert "falls from 54 at 1 step to 0.17 at 4" in good
    assert "plain flow matching is the better sampler here" in good
    assert (
        "1.9 after stage 1, 0.82 after stage 2" in good
        or "2.0 after stage 1, 0.82 after stage 2" in good
    )
    assert "get worse with steps" in good
    assert "cannot be told from real videos" in good
    bad = " ".join(
        findings(
            make_results(
                flow_matching=(54, 54, 54), on_policy=(3.0, 3.0, 3.0), consistency=(0.1, 0.1, 0.1)
            )
        )
    )
    assert "gains nothing from steps" in bad
    assert "stays behind" in bad
    assert "made 1 step worse" in bad
    assert "do not lose coverage" in bad
    assert "No method is perfect" in bad
