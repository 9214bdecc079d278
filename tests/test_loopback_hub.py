"""The loopback Hub under the real client: what it stores, whom it lets in, and what its faults do to a client."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_api,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from peft import get_peft_model
from tiny import tiny_images, tiny_model

from dynammo_peft import DynammoConfig


REPO = "tester/model"
SMALL, LARGE = b'{"a": 1}\n', bytes(range(256)) * 64
CARD = b"---\nlibrary_name: peft\ntags: [vision]\n---\n# A card\n"


@pytest.fixture
def api(hub, waits):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "merged").mkdir(parents=True)
    (path / "README.md").write_bytes(CARD)
    (path / "config.json").write_bytes(SMALL)
    (path / "merged" / "model.safetensors").write_bytes(LARGE)
    return path


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def read(path):
    return Path(path).read_bytes()


def pushed(hub, **arguments):
    """The repository's files without those that the Hub adds."""
    return {path: data for path, data in hub.files(REPO, **arguments).items() if path != ".gitattributes"}


def sent(hub, pattern):
    return [(record.method, record.status) for record in hub.requests if pattern in record.url]


def commit_lines(hub, *lines):
    """The answer to a commit of these operations, as no client would send them."""
    return httpx.post(
        f"{hub.url}/api/models/{REPO}/commit/main",
        content="\n".join(json.dumps(line) for line in ({"key": "header", "value": {"summary": "a"}}, *lines)),
        headers={"Authorization": f"Bearer {hub.token}"},
        trust_env=False,
    )


def add(path="config.json", data=SMALL):
    return [CommitOperationAdd(path, data)]


def test_a_folder_goes_up_and_comes_down_again(hub, api, folder, tmp_path):
    api.create_repo(REPO)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Add", commit_description="All of it")
    assert pushed(hub) == contents(folder)
    last, first = hub.history(REPO)
    assert (last.oid, last.parent, last.title, last.message) == (commit.oid, first.oid, "Add", "All of it")
    assert (last.author, first.author) == ("tester", "system")
    assert [path for path, blob in last.files.items() if blob.lfs] == ["merged/model.safetensors"]
    path = snapshot_download(REPO, token=hub.token, local_dir=tmp_path / "down")
    assert contents(tmp_path / "down").items() >= contents(folder).items()
    assert read(hf_hub_download(REPO, "config.json", token=hub.token)) == SMALL
    assert path == str(tmp_path / "down")


def test_large_files_go_to_the_storage_and_no_token_does(hub, api, tmp_path):
    api.create_repo(REPO)
    text = b"line of text\n" * 850_000
    api.create_commit(REPO, add("a.txt", text) + add("b.safetensors") + add("c.txt"), commit_message="Add")
    assert {path for path, blob in hub.history(REPO)[0].files.items() if blob.lfs} == {"a.txt", "b.safetensors"}
    assert read(hf_hub_download(REPO, "a.txt", token=hub.token)) == text
    stored = [record for record in hub.requests if record.storage]
    assert {record.method for record in stored} == {"PUT", "GET"}
    assert not any("authorization" in record.headers for record in stored)


def test_what_is_there_is_not_sent_again(hub, api, folder):
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert len(hub.history(REPO)) == 2
    (folder / "again.safetensors").write_bytes(LARGE)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert not [record for record in hub.requests if record.method == "PUT"]
    assert pushed(hub) == contents(folder)


def test_files_are_deleted_copied_and_ignored(hub, api, folder):
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    api.delete_file("config.json", REPO)
    assert sorted(pushed(hub)) == ["README.md", "merged/model.safetensors"]
    moved = [CommitOperationCopy("merged/model.safetensors", "model.safetensors"), CommitOperationDelete("merged/")]
    api.create_commit(REPO, [*moved, CommitOperationCopy("README.md", "b/README.md")], commit_message="Move")
    assert pushed(hub) == {"README.md": CARD, "b/README.md": CARD, "model.safetensors": LARGE}
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("nothing.json", REPO)
    api.create_commit(REPO, add(".gitignore", b"*.log\n") + add("a.log"), commit_message="Ignore")
    assert "a.log" not in pushed(hub)


def test_revisions(hub, api):
    api.create_repo(REPO)
    first = api.create_commit(REPO, add(), commit_message="First").oid
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="with/slash", revision="v1")
    api.create_commit(REPO, add(data=b"2"), commit_message="Second", revision="with/slash")
    third = api.create_commit(REPO, add(data=b"3"), commit_message="Third").oid
    found = {
        revision: read(hf_hub_download(REPO, "config.json", revision=revision))
        for revision in ("v1", "with/slash", "main", first, third[:7])
    }
    assert found == {"v1": SMALL, "with/slash": b"2", "main": b"3", first: SMALL, third[:7]: b"3"}
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["Third", "First", "initial commit"]
    assert [commit.title for commit in hub.history(REPO, "with/slash")] == ["Second", "First", "initial commit"]
    refs = api.list_repo_refs(REPO)
    assert {ref.name for ref in refs.branches} == {"main", "with/slash"}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="with/slash")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="with/slash")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "nothing.json")
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, add(), commit_message="Nowhere", revision="nowhere")


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_other_types_of_repositories(hub, api, folder, tmp_path, kind):
    url = api.create_repo(REPO, repo_type=kind, space_sdk="static" if kind == "space" else None)
    assert (url.repo_id, url.repo_type) == (REPO, kind)
    api.upload_folder(repo_id=REPO, repo_type=kind, folder_path=folder)
    snapshot_download(REPO, repo_type=kind, local_dir=tmp_path / "down")
    assert contents(tmp_path / "down").items() >= contents(folder).items()
    assert pushed(hub, repo_type=kind) == contents(folder)
    assert api.repo_info(REPO, repo_type=kind).sha == hub.history(REPO, repo_type=kind)[0].oid
    assert not api.repo_exists(REPO)


def test_descriptions_of_a_repository(hub, api, folder):
    hub.create_repo(REPO, files=contents(folder))
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.author, info.private, info.library_name, info.tags) == (
        REPO, "tester", False, "peft", ["vision"],
    )  # fmt: skip
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    assert sizes["merged/model.safetensors"] == (len(LARGE), True) and sizes["config.json"] == (len(SMALL), False)
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [
        "merged",
        ".gitattributes",
        "README.md",
        "config.json",
    ]
    assert [entry.path for entry in api.list_repo_tree(REPO, "merged")] == ["merged/model.safetensors"]
    assert "merged/model.safetensors" in api.list_repo_files(REPO)
    assert [entry.path for entry in api.get_paths_info(REPO, ["config.json", "merged", "no"])] == [
        "config.json",
        "merged",
    ]
    assert api.whoami()["name"] == "tester"


def test_creating_what_exists(hub, api):
    assert api.create_repo("model").repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_a_commit_onto_a_stale_parent_is_refused(hub, api):
    api.create_repo(REPO)
    first = api.create_commit(REPO, add(), commit_message="First").oid
    api.create_commit(REPO, add(data=b"2"), commit_message="Second", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.create_commit(REPO, add(data=b"3"), commit_message="Third", parent_commit=first)
    assert caught.value.response.status_code == 412
    assert pushed(hub) == {"config.json": b"2"}


def test_private_repositories_are_not_there_for_others(hub, api):
    api.create_repo(REPO, private=True)
    api.create_commit(REPO, add(), commit_message="Add")
    for token, status in ((False, 401), (hub.add_user("stranger"), 404)):
        for call in (api.model_info, api.list_repo_files, partial(hf_hub_download, filename="config.json")):
            with pytest.raises(RepositoryNotFoundError) as caught:
                call(REPO, token=token)
            assert caught.value.response.status_code == status
    for name in ("tester/missing", "missing"):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(name, "config.json")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        api.model_info(REPO, token="hf_wrong")
    assert not isinstance(caught.value, RepositoryNotFoundError)
    for token in (hub.token, hub.add_user("member", organizations=("tester",))):
        assert hf_hub_download(REPO, "config.json", token=token)


def test_only_the_owner_may_write(hub, api):
    api.create_repo(REPO)
    reader, stranger = hub.add_user("tester", role="read"), hub.add_user("stranger")
    member = hub.add_user("member", organizations=("tester",))
    for token in (reader, stranger):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            api.create_commit(REPO, add(), commit_message="Add", token=token)
        with pytest.raises(HfHubHTTPError, match='rights to create a model under the namespace "tester"'):
            api.create_repo("tester/other", token=token)
    with pytest.raises(RepositoryNotFoundError):
        api.create_commit("tester/missing", add(), commit_message="Add")
    assert api.create_commit(REPO, add(), commit_message="Add", token=member).oid == hub.history(REPO)[0].oid
    assert hub.history(REPO)[0].author == "member"


def test_gated_repositories(hub, api):
    hub.create_repo(REPO, files={"config.json": SMALL}).granted.add("friend")
    api.update_repo_settings(REPO, gated="auto")
    for token, status in ((False, 401), (hub.add_user("stranger"), 403)):
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download(REPO, "config.json", token=token)
        assert caught.value.response.status_code == status
        assert api.model_info(REPO, token=token).gated == "auto"
    assert hf_hub_download(REPO, "config.json", token=hub.add_user("friend"))


@pytest.mark.parametrize(
    "header, message",
    [
        ("tags: vision", '"tags" must be an array'),
        ("a: [", "Invalid YAML"),
        ("base_model: /home/somebody/base", '"base_model" with value "/home/somebody/base" is not valid'),
        ("model-index: [{name: a, results: [{task: {type: b}, metrics: [{type: c}]}]}]", r"metrics\[0\].value"),
    ],
)
def test_a_card_with_invalid_metadata_is_refused_before_anything_is_uploaded(hub, api, folder, header, message):
    api.create_repo(REPO)
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    with pytest.raises(ValueError, match=message):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert not sent(hub, "/preupload/")
    # Behind the client's check stands that of the commit.
    value = {"path": "README.md", "content": (folder / "README.md").read_text()}
    assert commit_lines(hub, {"key": "file", "value": value}).status_code == 400 and pushed(hub) == {}


def test_a_commit_is_made_whole_or_not_at_all(hub, api):
    api.create_repo(REPO)
    good = {"key": "file", "value": {"path": "a", "content": "a"}}
    for bad in (
        {"key": "lfsFile", "value": {"path": "b", "oid": "0" * 64}},
        {"key": "deletedFile", "value": {"path": "b"}},
        {"key": "unknown", "value": {"path": "b"}},
    ):
        assert commit_lines(hub, good, bad).status_code in (400, 404) and pushed(hub) == {}
    assert len(hub.history(REPO)) == 1
    assert commit_lines(hub, good).status_code == 200 and pushed(hub) == {"a": b"a"}


def test_the_storage_takes_only_what_was_announced(hub):
    hub.create_repo(REPO)
    path = f"/models/{REPO}/{'0' * 64}"
    for url, status in ((hub.signed("PUT", path), 400), (f"{hub.storage_url}{path}", 403)):
        assert httpx.put(url, content=LARGE, trust_env=False).status_code == status
    assert hub.repository(REPO).objects == {}


def test_a_card_without_metadata_warns(hub, api):
    api.create_repo(REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_commit(REPO, add("README.md", b"# A card"), commit_message="Add")


def test_commits_at_the_same_time_are_one_history(hub, api):
    api.create_repo(REPO)
    with ThreadPoolExecutor(5) as pool:
        made = pool.map(lambda name: api.create_commit(REPO, add(name), commit_message=name).oid, "abcde")
    history = hub.history(REPO)
    assert {commit.oid for commit in history[:-1]} == set(made)
    assert sorted(pushed(hub)) == list("abcde")
    assert sorted(len(commit.files) for commit in history) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", ["*/preupload/*", "*/objects/batch", "*signature=*", "*/objects/verify"])
def test_the_client_tries_the_steps_before_a_commit_again(hub, api, waits, folder, step):
    api.create_repo(REPO)
    hub.fail(step, times=2)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert pushed(hub) == contents(folder)
    assert waits == [1, 2]


def test_retry_after_is_respected(hub, api, waits):
    api.create_repo(REPO)
    hub.fail("*/preupload/*", status=429, retry_after=7)
    api.create_commit(REPO, add(), commit_message="Add")
    assert waits == [8]


@pytest.mark.parametrize("step", ["*/repos/create", "*/validate-yaml", "*/commit/*"])
def test_the_client_does_not_try_these_again(hub, api, waits, folder, step):
    hub.fail(step)
    with pytest.raises(HfHubHTTPError, match="A planned fault") as caught:
        api.create_repo(REPO, exist_ok=True)
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert caught.value.response.status_code == 503 and waits == []
    assert all(repo.history()[0].author == "system" for repo in hub.repositories.values())


def test_the_client_gives_up_after_five_more_tries(hub, api, waits):
    api.create_repo(REPO)
    hub.fail("*/preupload/*", times=6)
    with pytest.raises(HfHubHTTPError, match="A planned fault"):
        api.create_commit(REPO, add(), commit_message="Add")
    assert waits == [1, 2, 4, 8, 8] and sent(hub, "/preupload/") == [("POST", 503)] * 6


def test_an_upload_that_is_cut_is_sent_again(hub, api, waits, folder):
    api.create_repo(REPO)
    hub.cut("*", after_bytes=1000, method="PUT")
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert pushed(hub) == contents(folder)
    puts = [(len(record.body), record.status) for record in hub.requests if record.method == "PUT"]
    assert puts == [(1000, None), (len(LARGE), 200)] and waits == [1]


def test_an_upload_that_is_always_cut_leaves_the_repository_as_it_was(hub, api, folder):
    api.create_repo(REPO)
    hub.cut("*", after_bytes=1000, method="PUT", times=6)
    with pytest.raises(RuntimeError, match="Error while uploading 'merged/model.safetensors'") as caught:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert isinstance(caught.value.__cause__, httpx.TransportError)
    assert pushed(hub) == {} and len(hub.history(REPO)) == 1 and hub.repository(REPO).objects == {}


def test_a_commit_that_is_cut_leaves_the_repository_as_it_was(hub, api, folder):
    api.create_repo(REPO)
    hub.cut("*/commit/*", after_bytes=150)
    with pytest.raises(httpx.TransportError):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(sent(hub, "/commit/")) == 1 and len(hub.history(REPO)) == 1
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert pushed(hub) == contents(folder)


def test_the_answer_to_a_commit_is_lost(hub, api):
    api.create_repo(REPO)
    hub.cut("*/commit/*", after_bytes=10, in_answer=True)
    with pytest.raises(httpx.RemoteProtocolError):
        api.create_commit(REPO, add(), commit_message="Add")
    assert pushed(hub) == {"config.json": SMALL}
    hub.fail("*/commit/*", status=504, done=True)
    with pytest.raises(HfHubHTTPError, match="504"):
        api.create_commit(REPO, add(data=b"2"), commit_message="Add")
    assert pushed(hub) == {"config.json": b"2"}


def test_a_download_that_is_cut_goes_on(hub, waits):
    data = bytes(range(256)) * 45_000
    hub.create_repo(REPO, files={"a.bin": data, "config.json": SMALL})
    hub.cut("*config.json*", after_bytes=3, method="GET")
    assert read(hf_hub_download(REPO, "config.json")) == SMALL
    hub.cut("*a.bin*", after_bytes=11_000_000, method="GET", in_answer=True)
    assert read(hf_hub_download(REPO, "a.bin")) == data
    ranges = [record.headers.get("range") for record in hub.requests if record.storage]
    assert ranges == [None, f"bytes={10 * 1024 * 1024}-"]
    assert waits == [1, 1]


@pytest.mark.parametrize(
    "asked, status, part, told",
    [
        ("bytes=2-4", 206, b"cde", "bytes 2-4/6"),
        ("bytes=4-", 206, b"ef", "bytes 4-5/6"),
        ("bytes=-2", 206, b"ef", "bytes 4-5/6"),
        ("bytes=6-", 416, None, "bytes */6"),
    ],
)
def test_parts_of_files(hub, asked, status, part, told):
    hub.create_repo(REPO, files={"a.bin": b"abcdef", "a.txt": b"abcdef"})
    for name in ("a.bin", "a.txt"):
        url = f"{hub.url}/{REPO}/resolve/main/{name}"
        answer = httpx.get(url, headers={"Range": asked}, follow_redirects=True, trust_env=False)
        assert (answer.status_code, answer.headers["Content-Range"]) == (status, told)
        assert part is None or answer.content == part


def test_a_download_whose_connection_is_reset_fails(hub, waits):
    hub.create_repo(REPO, files={"config.json": SMALL})
    hub.cut("*config.json*", after_bytes=3, method="GET", reset=True)
    with pytest.raises(httpx.ReadError):
        hf_hub_download(REPO, "config.json")
    assert waits == []


def test_a_slow_answer(hub, waits):
    hub.create_repo(REPO, files={"config.json": SMALL})
    hub.slow("*/resolve/*", 0.5, method="HEAD")
    assert read(hf_hub_download(REPO, "config.json", etag_timeout=0.2)) == SMALL
    assert [method for method, _ in sent(hub, "/resolve/")] == ["HEAD", "HEAD"]


def test_the_record_holds_every_byte(hub, api):
    api.create_repo(REPO)
    # Split by base64 and by escapes of JSON, and so not in what was sent as it was sent.
    added = add("ordner/ä.json", b"x secret-1 x") + add("b.safetensors", b"secret-2") + add("ä.txt", b"secret-3 " * 99)
    api.create_commit(REPO, added, commit_message="Größe secret-4", commit_description="secret-5")
    # Behind the sample of 512 bytes that goes first, and in a line that is cut.
    hub.cut("*/commit/*", after_bytes=1500)
    with pytest.raises(httpx.TransportError):
        api.create_commit(REPO, add("c", b"." * 600 + b"secret-6 " * 99), commit_message="cut")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "ö.json", user_agent="secret-7")
    received = hub.uploaded_bytes()
    for word in (*(f"secret-{number}" for number in range(1, 8)), "Größe", "ordner/ä.json", "ö.json", hub.token):
        assert word.encode() in received, word
    assert b"secret-8" not in received


def test_a_process_has_its_settings_back(hub, monkeypatch):
    before = (vars(constants).copy(), dict(os.environ), hf_api.api.endpoint)
    with monkeypatch.context() as patch:
        hub.connect(patch)
        assert (constants.ENDPOINT, hf_api.api.endpoint, os.environ["HF_TOKEN"]) == (hub.url, hub.url, hub.token)
        assert "HF_HUB_OFFLINE" not in os.environ
    assert (vars(constants), dict(os.environ), hf_api.api.endpoint) == before


def test_the_environment_of_a_process(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    monkeypatch.setenv("https_proxy", "http://elsewhere")
    found = hub.environment("fresh", HF_TOKEN=None, HF_HUB_DISABLE_TELEMETRY="1")
    assert (found["HF_ENDPOINT"], found["HF_HOME"]) == (hub.url, str(hub.home / "fresh"))
    assert found["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert not {"HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "https_proxy"} & set(found)


def test_what_is_missing_says_so(hub):
    answer = httpx.get(f"{hub.url}/api/nothing", trust_env=False)
    assert (answer.status_code, answer.json()) == (404, {"error": "No route for GET /api/nothing"})


def test_models_are_pushed_and_load_in_a_fresh_process(hub, waits, tmp_path):
    model, images = tiny_model("resnet_basic"), tiny_images("resnet_basic")
    model.push_to_hub("base", private=True)
    adapted = get_peft_model(tiny_model("resnet_basic"), DynammoConfig(classes=["a", "b"]), "default").eval()
    adapted.base_model_name_or_path = "tester/base"
    adapted.peft_config["default"].base_model_name_or_path = "tester/base"
    adapted.push_to_hub("adapter")
    assert {"config.json", "model.safetensors"} <= set(hub.files("tester/base"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("tester/adapter"))
    torch.save(images, tmp_path / "images.pt")
    hub.requests.clear()
    printed = hub.run(
        """
        import sys, json, torch
        from peft import PeftModel
        from transformers import AutoModelForImageClassification
        import dynammo_peft
        images = torch.load(sys.argv[1])
        with torch.no_grad():
            base = AutoModelForImageClassification.from_pretrained("tester/base")
            print(json.dumps(base(images).logits.tolist()))
            model = PeftModel.from_pretrained(base, "tester/adapter").eval()
            print(json.dumps(model(images).logits.tolist()))
        model.push_to_hub("copy")
        """,
        str(tmp_path / "images.pt"),
        home="fresh",
    )
    logits = [torch.tensor(json.loads(line)) for line in printed.splitlines()]
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(images).logits)
        torch.testing.assert_close(logits[1], adapted(images).logits)
    weights = "adapter_model.safetensors"
    assert hub.files("tester/copy")[weights] == hub.files("tester/adapter")[weights]
    assert all(record.status < 500 for record in hub.requests)
    assert (hub.home / "fresh" / "hub" / "models--tester--adapter").is_dir()
