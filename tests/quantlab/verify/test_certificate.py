"""What a certificate says, on a card and at a terminal, and what its sections replace."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from quantlab.data.hellaswag import Document
from quantlab.errors import VerificationError
from quantlab.export.engines import Engine
from quantlab.verify.agreement import Agreement, Flip, Gap, compare
from quantlab.verify.card import BEGIN, into_card, section
from quantlab.verify.certificate import Certificate, Row
from quantlab.verify.codes import CodesReport
from quantlab.verify.process import Answer, ReaderError, parsed
from quantlab.verify.questions import Request
from quantlab.verify.size import SizeReport
from quantlab.verify.tables import certificate_table

FLIP = Flip(17, "acc_norm", 1, 3, 0.25, -0.5)
AGREEMENT = Agreement("q8", {"logits": Gap(0.5, 0.1)}, {"logits": Gap(0.75, 0.2)}, 0.003, (), 20, (FLIP,))
LLAMA = Engine("llama_cpp", "here", "faster", "A | note <b>of</b> `it` -->")
VLLM = Engine("vLLM", "elsewhere", "faster")
CERTIFICATE = Certificate(
    "q4_0",
    "gguf",
    "ab" * 32,
    5,
    CodesReport(num_linears=14, num_weights=61_440, num_zeros=30, zeros_at_0=2, zeros_at_max=1),
    SizeReport(34_560, 34_560, 310_912, 4.5),
    (
        Row(LLAMA, "agrees", "", {"llama_cpp_python": "0.3"}, AGREEMENT, 5_000_000, 1.5),
        Row(VLLM, "should load"),
    ),
    "cd" * 32,
    20,
)


def test_a_card_holds_one_certificate_however_often_it_is_put_there() -> None:
    card = "---\na: b\n---\n\n# Model\n"
    once = into_card(card, CERTIFICATE)
    assert once.startswith(card.rstrip()) and once.count("## Certificate") == 1
    assert into_card(once, CERTIFICATE) == once
    failed = replace(CERTIFICATE, broken="it is damaged")
    twice = into_card(once + "\nMore.\n", failed)
    assert "Not verified: it is damaged." in twice and "Verified: 14" not in twice
    assert twice.endswith("\nMore.\n")


def test_a_section_says_what_was_found_and_renders_nothing_of_unknown_origin() -> None:
    text = section(CERTIFICATE)
    assert (
        "| llama_cpp | loads here and agrees | faster where it has a kernel | q8 | 0.5 (at most 0.75) |"
        in text
    )
    assert "| vLLM | should load, by the format's documentation |" in text
    assert "19 of 20 answers the same" in text
    assert "| llama_cpp | 17 | acc_norm | 1 / 3 | 0.2500 | -0.5000 |" in text
    assert "30, 2 of them at 0 and 1 at the largest code" in text
    assert "A \\| note &lt;b&gt;of&lt;/b&gt; 'it' --&gt; llama_cpp_python 0.3" in text
    assert text.count("-->") == 2


def test_a_terminal_shows_time_and_memory_which_the_certificate_leaves_out() -> None:
    out = io.StringIO()
    Console(file=out, width=250).print(certificate_table(CERTIFICATE))
    shown = out.getvalue()
    for text in ("14 of 14 linears bit for bit", "19 of 20 the same", "1.5", "acc_norm", CERTIFICATE.verdict):
        assert text in shown, text
    assert "peak_bytes" not in CERTIFICATE.text() and "seconds" not in CERTIFICATE.text()


def test_one_engine_that_agrees_is_enough_and_one_that_disagrees_too_much() -> None:
    crashed = Row(Engine("transformers", "here", "smaller"), "failed", "it was ended by SIGSEGV")
    assert replace(CERTIFICATE, rows=(*CERTIFICATE.rows, crashed)).verified
    wrong = replace(crashed, state="disagrees", reason="gaps are beyond what float32 explains: logits")
    with pytest.raises(VerificationError, match="transformers must agree with the codes: gaps are beyond"):
        replace(CERTIFICATE, rows=(*CERTIFICATE.rows, wrong)).check()
    with pytest.raises(VerificationError, match=r"none did \(transformers failed: it was ended by SIGSEGV\)"):
        replace(CERTIFICATE, rows=(crashed, Row(VLLM, "should load"))).check()


def request(num_documents: int = 2) -> Request:
    documents = tuple(Document(place, "q", ("aa", "bbbb", "c", "d"), 1) for place in range(num_documents))
    row = np.arange(3)
    return Request(documents, "", (row,) * 4 * num_documents, (1,) * 4 * num_documents, (row,))


def answer(ll: list[float], logits: float = 0.0, hidden: tuple[float, ...] = (0.0, 0.0)) -> Answer:
    def filled(value: float, width: int) -> np.ndarray:
        return np.full((3, width), value, np.float32)

    states = tuple(filled(value, 4) for value in hidden)
    return Answer(np.array(ll), (filled(logits, 5),), (states,) if hidden else None, {}, "")


ZEROS = [0.0] * 8


def test_gaps_are_allowed_twice_those_of_our_own_model_in_that_arithmetic() -> None:
    reference, plain = answer(ZEROS), answer(ZEROS, 0.5, (0.0, 0.25))
    for logits, hidden, beyond in (
        (1.0, (0.0, 0.5), ()),
        (1.001, (0.0, 0.5), ("logits",)),
        (1.0, (2**-24, 0.5), ("hidden 0",)),
        (1.0, (0.0, 0.501), ("hidden 1",)),
        (float("nan"), (0.0, 0.0), ("logits",)),
        (1.0, (), ()),
        (1.0, (0.0,), ("hidden 1",)),
        (1.0, (0.0, 0.5, 0.5), ("hidden 2",)),
    ):
        found = compare(answer(ZEROS, logits, hidden), "float16", plain, reference, plain, request())
        assert found.beyond == beyond, (logits, hidden)
    # A constant added to all logits changes no distribution.
    assert found.divergence == 0.0 and found.agrees is False


def test_a_model_of_ours_that_overflows_allows_nothing() -> None:
    reference, plain = answer(ZEROS), answer(ZEROS, float("inf"))
    for logits in (1.0, float("inf")):
        found = compare(answer(ZEROS, logits), "float16", reference, reference, plain, request())
        assert found.beyond == ("logits",), logits
    assert found.divergence == float("inf")


def test_flips_are_told_per_score_with_margins_of_the_right_ending() -> None:
    ours = answer([-2.0, -3.0, -9.0, -9.0, *ZEROS[:4]])
    theirs = answer([-3.5, -3.0, -9.0, -9.0, *ZEROS[:4]])
    found = compare(theirs, "float32", ours, ours, ours, request())
    # Per character: ours -1 and -0.75, theirs -1.75 and -0.75: the same ending.
    assert found.flips == (Flip(0, "acc", 0, 1, -1.0, 0.5),)
    assert found.num_same == 1 and found.agrees
    assert not compare(answer([float("nan"), *ZEROS[:7]]), "float32", ours, ours, ours, request()).agrees


def test_an_answer_has_as_many_layers_in_every_probe() -> None:
    states = np.zeros((3, 4), np.float32)
    arrays = {
        "ll": np.zeros(8),
        "logits_0": states,
        "logits_1": states,
        "hidden_0_0": states,
        "hidden_1_0": states,
    }
    facts = {"versions": {}, "arithmetic": "", "peak_bytes": 0, "load_s": 0.0, "run_s": 0.0}
    asked = replace(request(), probes=(np.arange(3), np.arange(3)))
    assert parsed(arrays, facts, asked).hidden is not None
    for change in ({"hidden_1_1": states}, {"logits_1": states[1:]}, {"ll": np.zeros(7)}):
        with pytest.raises(ReaderError, match="other shapes"):
            parsed(arrays | change, facts, asked)
    with pytest.raises(ReaderError, match="its answer is not one: KeyError"):
        parsed(arrays, {}, asked)


def test_a_card_whose_certificate_lost_its_end_keeps_every_word() -> None:
    card = f"# Model\n\n{BEGIN}\nhalf a certificate\n\nWords of the user.\n"
    assert into_card(card, CERTIFICATE) == card.rstrip("\n") + "\n\n" + section(CERTIFICATE) + "\n"
