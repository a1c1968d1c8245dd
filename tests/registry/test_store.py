"""One contract for both stores: the folder, and S3 on a real server."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.awsrequest import AWSRequest
from moto import mock_aws

from registry.errors import KeyRefused, ObjectDiffers, ObjectMissing, StoreUnavailable
from registry.store import FolderStore, ObjectStore, S3Store, open_store, overwrites, s3_client, version_prefix
from tests.servers import S3Server

KEY = "t/acme/u/0a1b/default/default-1/adapter_model.safetensors"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of each kind in turn."""
    url = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_url")
    opened = open_store(url)
    opened.set_up()
    return opened


def test_what_was_put_comes_back(store: ObjectStore) -> None:
    """Bytes are bytes, the empty object and one larger than a chunk included."""
    large = bytes(range(256)) * 20_000

    for number, data in enumerate([b"", b"\0\r\n", large]):
        assert store.put_new(f"t/a/{number}", data)

        assert store.get(f"t/a/{number}") == data
        assert b"".join(store.stream(f"t/a/{number}")) == data
        assert store.size(f"t/a/{number}") == len(data)


def test_putting_the_same_again_changes_nothing(store: ObjectStore) -> None:
    """A retry after a lost answer must be harmless."""
    assert store.put_new(KEY, b"weights") is True

    assert store.put_new(KEY, b"weights") is False
    assert store.get(KEY) == b"weights"


def test_an_object_is_never_overwritten(store: ObjectStore) -> None:
    """Keys are immutable: other bytes are an error that names both digests, and the first stay."""
    store.put_new(KEY, b"first")

    with pytest.raises(ObjectDiffers, match=hashlib.sha256(b"first").hexdigest()[:12]):
        store.put_new(KEY, b"second")

    assert store.get(KEY) == b"first"


def test_of_sixteen_racers_one_writes(store: ObjectStore) -> None:
    """The store decides who was first, not a look before the leap."""
    with ThreadPoolExecutor(16) as pool:
        wrote = list(pool.map(lambda _: store.put_new(KEY, b"same"), range(16)))

    assert sum(wrote) == 1
    assert store.get(KEY) == b"same"


def test_of_sixteen_different_racers_one_wins_and_the_rest_are_told(store: ObjectStore) -> None:
    """No mixture, no silent loser."""

    def race(number: int) -> str:
        try:
            store.put_new(KEY, f"bytes of {number}".encode())
        except ObjectDiffers:
            return "told"
        return f"bytes of {number}"

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(race, range(16)))

    assert results.count("told") == 15
    assert store.get(KEY).decode() in results


def test_a_missing_object_is_named(store: ObjectStore) -> None:
    """Asking for what is not there says which key, and asking for its size says None."""
    assert store.size(KEY) is None

    with pytest.raises(ObjectMissing, match="adapter_model"):
        store.get(KEY)


def test_a_store_that_overwrites_is_found_out(store: ObjectStore) -> None:
    """As an S3 server does that ignores the condition of a PUT; nothing is left of the trial."""
    assert not overwrites(store)
    if isinstance(store, S3Store):
        store.client.meta.events.register("before-sign.s3.PutObject", _ignore_condition)

        assert overwrites(store)
    assert list(store.keys("")) == []


def _ignore_condition(request: AWSRequest, **_: object) -> None:
    del request.headers["If-None-Match"]


def test_deleting_twice_is_fine(store: ObjectStore) -> None:
    """A sweeper that was interrupted runs again."""
    store.put_new(KEY, b"weights")

    store.delete(KEY)
    store.delete(KEY)

    assert store.size(KEY) is None


def test_keys_lists_what_is_below_a_prefix_and_nothing_beside_it(store: ObjectStore) -> None:
    """`u/1` must not list `u/10`: sweeping one user must not reach another."""
    for key in ("t/a/u/1/x", "t/a/u/1/y/z", "t/a/u/10/x"):
        store.put_new(key, b"1")

    assert sorted(store.keys("t/a/u/1")) == ["t/a/u/1/x", "t/a/u/1/y/z"]
    assert len(list(store.keys(""))) == 3


def test_clearing_a_prefix_takes_what_is_below_it_and_nothing_beside_it(store: ObjectStore) -> None:
    """A sweeper that was interrupted runs again; one that is given nothing must not take everything."""
    for key in ("t/a/u/1/x", "t/a/u/1/y/z", "t/a/u/10/x"):
        store.put_new(key, b"1")

    assert [store.clear("t/a/u/1"), store.clear("t/a/u/1")] == [2, 0]
    with pytest.raises(KeyRefused):
        store.clear("")
    assert list(store.keys("")) == ["t/a/u/10/x"]


def test_a_prefix_that_is_an_object_has_nothing_below_it_and_is_cleared(store: ObjectStore) -> None:
    """On a folder too, where it is the same path."""
    for key in ("t/a/u/1", "t/a/u/10"):
        store.put_new(key, b"1")

    assert list(store.keys("t/a/u/1")) == []
    assert [store.clear("t/a/u/1"), store.clear("t/a/u/1")] == [1, 0]
    assert list(store.keys("")) == ["t/a/u/10"]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        "a/.hidden",
        "a\\b",
        "a\0b",
        "a\nb",
        "ä",
        "a b",
        "a/" + "x" * 256,
        "x/" * 600 + "y",
    ],
)
def test_a_key_that_some_store_could_misread_is_refused(store: ObjectStore, key: str) -> None:
    """Traversal, empty parts, control characters and lengths that differ between servers never reach one."""
    with pytest.raises(KeyRefused):
        store.put_new(key, b"1")


def test_checking_and_setting_up_again_are_harmless(store: ObjectStore) -> None:
    """`lora setup` may run at every start."""
    store.set_up()

    assert store.check()


URLS = ["", "http://host/bucket", "s3://", "s3://[", "s3://a b", "s3:/bucket", "file://elsewhere/x", "file://"]


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_is_no_store_is_refused(url: str) -> None:
    """With the forms that are."""
    with pytest.raises(StoreUnavailable, match=r"s3://bucket/prefix or file:///folder"):
        open_store(url)


def test_no_letter_of_a_url_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question mark or a hash cuts off nothing: another folder, or an allowed prefix, would be used in silence."""
    for url in (f"{tmp_path}/a?b#c", f"file://{tmp_path}/a?b#c", (tmp_path / "a?b#c").as_uri()):
        store = open_store(url)

        assert isinstance(store, FolderStore)
        assert store.root == tmp_path / "a?b#c"
    with pytest.raises(KeyRefused, match=r"a\?b#c"):
        open_store("s3://bucket/a?b#c")
    with pytest.raises(StoreUnavailable, match="home of nobody"):
        open_store("~nosuchuser/store")


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_PROFILE", "nosuch"), ("AWS_ENDPOINT_URL_S3", "foo"), ("AWS_REGION", "no region")]
)
def test_an_environment_that_boto_cannot_read_is_told(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """By the value, with the variables to check."""
    monkeypatch.setenv(variable, value)

    with pytest.raises(StoreUnavailable, match=f"{value}.*AWS_PROFILE, AWS_ENDPOINT_URL_S3"):
        s3_client()


FRANKFURT, COMMON = (f"https://bucket.s3.{place}amazonaws.com" for place in ("eu-central-1.", ""))
OURS = "http://s3.example:8000/bucket"
ENVIRONMENTS = [
    ({}, "eu-west-1", "https://bucket.s3.eu-west-1.amazonaws.com"),
    ({"AWS_PROFILE": "frankfurt"}, "eu-central-1", FRANKFURT),
    ({"AWS_DEFAULT_REGION": "eu-central-1"}, "eu-central-1", FRANKFURT),
    ({"AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-west-1"}, "eu-central-1", FRANKFURT),
    ({"AWS_PROFILE": "frankfurt", "AWS_ENDPOINT_URL": "https://s3.amazonaws.com"}, "eu-central-1", COMMON),
    ({"AWS_ENDPOINT_URL_S3": "http://s3.example:8000"}, "eu-west-1", OURS),
    ({"AWS_ENDPOINT_URL": "http://s3.example:8000"}, "eu-west-1", OURS),
    ({"AWS_PROFILE": "ours"}, "us-east-1", OURS),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "region", "place"), ENVIRONMENTS)
def test_region_and_server_are_those_that_boto_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], region: str, place: str
) -> None:
    """By variables or a profile; a URL is signed for the region's own host, as not every region has the common one."""
    config = "[default]\nregion=eu-west-1\n[profile frankfurt]\nregion=eu-central-1\n"
    (tmp_path / "config").write_text(f"{config}[profile ours]\nendpoint_url=http://s3.example:8000\n")
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in ({"AWS_CONFIG_FILE": str(tmp_path / "config")} | keys | environment).items():
        monkeypatch.setenv(name, value)

    store = S3Store("bucket")

    assert store.client.meta.region_name == region
    assert store.signed_url("a/b", 60).startswith(f"{place}/a/b?")


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
def test_a_bucket_of_aws_is_made_in_its_region(monkeypatch: pytest.MonkeyPatch, region: str) -> None:
    """AWS wants to be told which, unless it is the first one, which it must not be told."""
    for name, value in (("REGION", region), ("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with mock_aws():
        store = S3Store("some-bucket")

        store.set_up()

        assert store.check()
        assert store.client.head_bucket(Bucket="some-bucket")["BucketRegion"] == region


def test_a_bucket_that_is_not_there_says_what_to_do(s3_url: str) -> None:
    """A bucket, not an object without a name."""
    with pytest.raises(StoreUnavailable, match=r"no such bucket.*lora setup"):
        open_store(s3_url).check()


def test_a_store_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    """Not a traceback from the file system."""
    with pytest.raises(StoreUnavailable, match="lora setup"):
        FolderStore(tmp_path / "nowhere").check()


def test_a_wrong_secret_is_refused_without_showing_it(
    s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the variable, never its value."""
    if not s3_server.real:
        pytest.skip("moto checks no signature; run infra/install-test-servers for a server that does")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")

    with pytest.raises(StoreUnavailable, match="AWS_SECRET_ACCESS_KEY|rights") as caught:
        open_store(s3_url).set_up()

    assert "not-the-secret" not in str(caught.value)


def test_a_versions_place_names_no_person() -> None:
    """Keys reach logs and bills: the opaque id stands for the user."""
    assert version_prefix("acme", "0a1b", "default", "default-9") == "t/acme/u/0a1b/default/default-9"
