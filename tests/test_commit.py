"""Pushing: one commit whatever happens on the way, and who may not push is told why."""

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from loopback_hub import Waits
from test_publish import BASE, REPO, commits, learned, written
from tiny import tiny_model
from transformers import AutoModelForImageClassification

from dynammo_peft.hub import check_can_push, push_to_hub


@pytest.fixture
def model(hub, waits):
    tiny_model("vit").push_to_hub(BASE)
    return learned(AutoModelForImageClassification.from_pretrained(BASE))


@pytest.mark.parametrize("fault", ["503", "504 done", "answer lost", "request cut", "create 503", "412 after 504"])
def test_what_passes_is_tried_again_and_makes_one_commit(hub, model, monkeypatch, fault):
    naps = Waits()
    monkeypatch.setattr("dynammo_peft.hub.commit.time", naps)
    if fault == "503":
        hub.fail("*/commit/*", times=2)
    elif fault == "504 done":
        hub.fail("*/commit/*", status=504, done=True)
    elif fault == "answer lost":
        hub.cut("*/commit/*", after_bytes=10, in_answer=True)
    elif fault == "request cut":
        hub.cut("*/commit/*", after_bytes=400)
    elif fault == "create 503":
        hub.fail("*/repos/create")
    else:
        hub.fail("*/commit/*", status=504)
        hub.fail("*/commit/*", status=412)
    address = push_to_hub(model, REPO)
    assert address == f"{hub.url}/{REPO}/commit/{hub.history(REPO)[0].oid}"
    assert len(commits(hub)) == 1 and "adapter_model.safetensors" in written(hub)
    # Each try says what it follows, so that no commit of somebody else can be overwritten.
    lines = [record.body.split(b"\n")[0] for record in hub.requests if "/commit/" in record.url and REPO in record.url]
    assert lines and all(f'"parentCommit": "{hub.history(REPO)[1].oid}"'.encode() in line for line in lines)
    assert naps == ([1, 4] if fault in ("503", "412 after 504") else [1])


def test_a_commit_of_somebody_else_is_not_overwritten(hub, model, monkeypatch):
    api, other = HfApi(endpoint=hub.url, token=hub.token), b"of somebody else"

    def meanwhile(seconds):
        api.upload_file(path_or_fileobj=other, path_in_repo="README.md", repo_id=REPO)

    hub.fail("*/commit/*")
    monkeypatch.setattr("dynammo_peft.hub.commit.time", SimpleNamespace(sleep=meanwhile))
    with pytest.raises(ValueError, match="'tester/cells' was changed by somebody else meanwhile.*push again"):
        push_to_hub(model, REPO)
    assert hub.files(REPO)["README.md"] == other
    hub.fail("*/commit/*", status=412)
    with pytest.raises(ValueError, match="changed by somebody else meanwhile"):
        push_to_hub(model, REPO)


def test_what_lasts_leaves_the_repository_as_it_was(hub, model, monkeypatch):
    naps = Waits()
    monkeypatch.setattr("dynammo_peft.hub.commit.time", naps)
    push_to_hub(model, REPO, "standalone")
    before = hub.files(REPO)
    hub.cut("*", after_bytes=1000, method="PUT", times=6)
    with pytest.raises(ConnectionError, match="The connection to the Hub failed.*push again") as caught:
        push_to_hub(model, REPO)
    assert "\n" not in str(caught.value) and naps == []
    hub.fail("*/commit/*", times=4)
    with pytest.raises(ConnectionError, match="answers with status 503; try again later"):
        push_to_hub(model, REPO)
    assert naps == [1, 4, 16]
    assert hub.files(REPO) == before and len(commits(hub)) == 1


def test_who_may_not_push_is_told_before_anything_is_sent(hub, waits, monkeypatch):
    refused = {
        ("a b", None): "repo_id='a b' is no name of a repository on the Hub; use 'owner/name'",
        (REPO, "hf_wrong"): "does not accept the token; log in by `hf auth login`",
        (REPO, hub.add_user("tester", role="read")): "The token may only read",
        (REPO, hub.add_user("stranger")): "belongs to 'tester', but the token to 'stranger'; choose one of 'stranger'",
    }
    for (repo, token), message in refused.items():
        with pytest.raises(ValueError, match=message) as caught:
            check_can_push(repo, token)
        assert "\n" not in str(caught.value)
    hub.create_repo(REPO)
    with pytest.raises(ValueError, match="The token may not write to 'tester/cells'"):
        check_can_push(REPO, hub.add_user("stranger"))
    assert check_can_push("cells") == REPO
    assert check_can_push("lab/new", hub.add_user("member", organizations=("lab",))) == "lab/new"
    hub.fail("*whoami*")
    with pytest.raises(ConnectionError, match="status 503"):
        check_can_push(REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="There is no token for the Hub; log in by `hf auth login`"):
        check_can_push(REPO)
    assert {record.method for record in hub.requests} == {"GET"}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="The connection to the Hub failed"):
        check_can_push(REPO, hub.token)


def test_a_token_that_is_withdrawn_meanwhile(hub, model):
    hub.fail("*/commit/*", status=403, message="No more")
    with pytest.raises(ValueError, match="The token may not write to 'tester/cells'.*No more"):
        push_to_hub(model, REPO)
    hub.fail("*/commit/*", status=401)
    with pytest.raises(ValueError, match="hf auth login"):
        push_to_hub(model, REPO)
    assert commits(hub) == []
