"""`quantlab corpus`: the tokens of a training, made before it."""

from quantlab.cli import options
from quantlab.cli.printing import say, show


def corpus(config_file: options.Training, set_: options.Set = None, json_: options.Json = False) -> None:
    """Token files and a tokenizer from the texts that a training names; `quantlab train` does it by itself."""
    from quantlab.train.config import load_train_config
    from quantlab.train.corpus import open_corpus
    from quantlab.train.tables import corpus_table

    made = open_corpus(load_train_config(config_file, set_ or ()).corpus, say)
    result = made.facts | {"corpus": str(made.folder)}
    show(json_, result, lambda: corpus_table(result))
