"""Secrets: seen wherever they stand, hidden, found in the environment, refused in bindings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import pytest

from registry import gin_setup, recorders
from registry.secrets import concealed, forget, keep, kept, revealed

SECRET = "Zx9-hush_77"


@dataclass(frozen=True, kw_only=True)
class Post:
    """A part of somebody's own, one of whose fields takes a secret."""

    takes_secrets: ClassVar = ("address",)
    address: str = ""
    also: str = ""

    def start(self, name, folder, parent=None, tags=None): ...


@pytest.fixture
def post():
    before = kept()
    with recorders.temporary("post", Post):
        yield
    forget(before)


@pytest.mark.parametrize(
    "text",
    [
        f"http://me:{SECRET}@host:5000/path",
        f"postgresql+psycopg2://me:a@{SECRET}@host/db",
        f"http://me:with/{SECRET}#@host",
        f"redis://:{SECRET}@host",
        f"two: http://host/a and s3://key:{SECRET}@bucket",
        f"https://host/file?x=1&token={SECRET}&y=2",
        f"https://host/file?sslpassword={SECRET}",
        f"https://account.blob/x?sv=1&sig={SECRET}",
        f"https://s3/x?X-Amz-Signature={SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"{{'Authorization': 'Basic {SECRET}', 'Accept': '*'}}",
        f"x-api-key: {SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET} python train.py",
        f"connect(host='h', password='{SECRET}')",
        f"tool --api-key {SECRET} --out x",
    ],
)
def test_secret_is_hidden_where_it_stands(text: str) -> None:
    hidden = concealed(text)
    assert SECRET not in hidden
    assert "***" in hidden
    assert concealed(hidden) == hidden


@pytest.mark.parametrize("token", ["hf_" + "aB3" * 10, "ghp_" + "aB3" * 12, "glpat-" + "aB3" * 7])
def test_token_is_known_by_its_form(token: str) -> None:
    assert concealed(f"https://{token}@github.com/a/b.git and {token}.") == (
        "https://***@github.com/a/b.git and ***."
    )


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:5000/#/experiments/1@2",
        "sqlite:////data/a:b@c/mlflow.db",
        "git@github.com:somebody/something.git",
        "NUM_TOKENS = 4\ndit.num_tokens = 4",
        "Pool(token='cls', num_tokens=4)",
        "basic training of a bearer of news",
        "https://somebody@host/path",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert concealed(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"]
)
def test_secret_of_the_environment_is_hidden_everywhere(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert SECRET in concealed(f"refused: {SECRET}")
    monkeypatch.setenv(name, SECRET)
    assert concealed(f"refused: {SECRET}") == "refused: ***"


def test_password_of_an_address_in_the_environment_is_hidden_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p%40ss-w0rd@proxy")
    assert concealed("login p@ss-w0rd or p%40ss-w0rd failed") == "login *** or *** failed"


@pytest.mark.parametrize(
    ("name", "value"), [("PWD", "/a/place"), ("TOKENIZERS_PARALLELISM", "false12345")]
)
def test_other_variables_are_no_secrets(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert concealed(f"see {value}") == f"see {value}"


def test_long_text_is_read_in_time_that_grows_with_its_length() -> None:
    times = []
    for size in (20_000, 80_000):
        start = time.process_time()
        concealed("a" * size + "://" + "-" * size)
        times.append(time.process_time() - start)
    assert times[1] < 10 * times[0] + 0.05  # by its square it would be 16 times, and seconds


def test_kept_text_is_found_by_its_concealed_form(post: None) -> None:
    hidden = keep(f"http://me:{SECRET}@host")
    assert hidden == "http://me:***@host"
    assert revealed(hidden, "NOWHERE") == f"http://me:{SECRET}@host"
    assert revealed("http://me:***@other", "NOWHERE") is None


def test_password_may_come_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_PASSWORD", "a/b@c-1")
    assert revealed("http://me:***@host", "THE_PASSWORD") == "http://me:a%2Fb%40c-1@host"


@pytest.mark.parametrize("macro", [False, True])
def test_secret_of_a_field_that_takes_one_is_in_no_gin_text(post: None, macro: bool) -> None:
    address = f"http://me:{SECRET}@host"
    lines = ["post.address = %WHERE", f"WHERE = '{address}'"] if macro else []
    with gin_setup.isolated():
        gin_setup.parse([], lines or [f"post.address = '{address}'"])
        part = recorders.build("post")
        texts = (gin_setup.full_text(), gin_setup.operative_text(), repr(part))
        assert not any(SECRET in text for text in texts)
        assert "http://me:***@host" in texts[0]
        assert revealed(part.address, "NOWHERE") == address
    assert revealed("http://me:***@host", "NOWHERE") is None  # isolated() puts all back


@pytest.mark.parametrize(
    "value",
    [f"'http://me:{SECRET}@host'", "'http://me:***@host'", f"[1, {{'a': 'http://h/?token={SECRET}'}}]"],
)  # fmt: skip
def test_secret_in_another_binding_is_refused_without_being_shown(post: None, value: str) -> None:
    with gin_setup.isolated(), pytest.raises(ValueError, match=r"post\.also .* may not") as error:
        gin_setup.parse([], [f"post.also = {value}"])
    assert SECRET not in str(error.value)


def test_value_of_the_environment_in_a_binding_is_refused(
    post: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with gin_setup.isolated(), pytest.raises(ValueError, match=r"post\.also = '\*\*\*'"):
        gin_setup.parse([], [f"post.also = '{SECRET}'"])


def test_macro_whose_name_says_that_it_is_a_secret_is_refused(post: None) -> None:
    """Its text alone, which is a plain word, would pass."""
    with gin_setup.isolated(), pytest.raises(ValueError, match=r"db_password .* may not"):
        gin_setup.parse([], ["post.also = %db_password", "db_password = 'hush'"])
