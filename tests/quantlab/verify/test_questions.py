"""What readers are asked: four rows a document, and beginnings of documents as probes."""

from quantlab.config import HellaSwagConfig
from quantlab.verify.config import VerifyConfig
from quantlab.verify.questions import make_request
from tests.toys import NUM_TOKENS, toy_tokenizer


def test_a_probe_is_the_beginning_of_a_document_and_each_is_another() -> None:
    config = VerifyConfig(hellaswag=HellaSwagConfig(limit=4), num_probes=3, probe_tokens=9)
    request = make_request(toy_tokenizer(), config, NUM_TOKENS)
    assert len(request.rows) == len(request.starts) == 16 and len(request.probes) == 3
    for number, probe in enumerate(request.probes):
        assert probe.tolist() == request.rows[4 * number][:9].tolist()
    for row, start, document in zip(request.rows[::4], request.starts[::4], request.documents, strict=True):
        assert toy_tokenizer().decode(row[:start]) == document.query
