from translora.config import GateConfig
from translora.gate.agreement import judge, share_equal


def test_agreement_is_exact_match_after_normalising() -> None:
    assert share_equal([" Red ", "blue", "red  hat", None], ["red", "red", "Red hat", "x"]) == 0.5


def test_the_gate_names_each_limit_that_was_missed() -> None:
    config = GateConfig(min_agreement=0.6, min_gain=0.1)
    assert judge(0.9, 0.2, 20, config).passed
    low = judge(0.5, 0.0, 20, config)
    assert not low.passed and low.reason == "agreement 0.50 < gate.min_agreement 0.60"
    no_gain = judge(0.8, 0.75, 20, config)
    assert not no_gain.passed and no_gain.reason == "gain over the target base +0.05 < gate.min_gain +0.10"
