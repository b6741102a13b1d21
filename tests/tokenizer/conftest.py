import pytest

from minillm.tokenizer import load_tokenizer, train_bpe, train_sentencepiece

# Which tokenizers a module's tests run with; elsewhere the byte-level one alone.
KINDS = {
    "test_base": ["bpe", "sentencepiece"],
    "test_chat": ["bpe", "sentencepiece"],
    "test_sentencepiece_bpe": ["sentencepiece"],
}

SENTENCES = [
    "The quick brown fox has 12 apples and the lazy dog has 345.\n",
    "小明有三个苹果，小红有12个梨。他们一共有多少个水果？\n",
    "def add(a, b):\n    return a + b  # 加法\n\n",
    "Don't you think we'll see what they've done? I'm sure.\n",
    "人工智能正在改变世界，我们可以用Python编程。\n",
    "user system assistant tool think answer\n",
]


SYLLABLES = ["ka", "mo", "ri", "te", "lun", "sa", "pe", "dor", "vi", "gan", *"山水火木金天地人日月"]


def texts_of_corpus():
    """Enough different words for 600 tokens, few enough to train in a fraction of a second."""
    for n in range(300):
        word = SYLLABLES[n % 10] + SYLLABLES[n // 10 % 10]
        name = SYLLABLES[10 + n % 10] + SYLLABLES[10 + n // 10 % 10]
        yield SENTENCES[n % len(SENTENCES)] + f"{n * 37} {word} {name}。\n"


@pytest.fixture(scope="session")
def sentences():
    return SENTENCES


@pytest.fixture(scope="session")
def corpus():
    """Call it for a fresh iterator of the same texts."""
    return texts_of_corpus


def pytest_generate_tests(metafunc):
    """Run the contracts of the modules in KINDS with each kind of tokenizer that the module names."""
    if "kind" in metafunc.fixturenames:
        kinds = KINDS.get(metafunc.module.__name__.split(".")[-1], ["bpe"])
        metafunc.parametrize("kind", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def kind(request):
    if request.param == "sentencepiece":
        pytest.importorskip("sentencepiece")
    return request.param


@pytest.fixture(scope="session")
def tokenizer(kind):
    """A tokenizer of 600 ids trained on the corpus."""
    train = {"bpe": train_bpe, "sentencepiece": train_sentencepiece}[kind]
    return train(texts_of_corpus(), vocab_size=600)


@pytest.fixture(scope="session")
def saved(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def loaded(saved):
    return load_tokenizer(saved)


@pytest.fixture(scope="session")
def theirs(saved):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(saved)
