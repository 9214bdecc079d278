"""Fisher information and Gram matrices, against gradients and inputs taken one by one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_images, tiny_language_model, tiny_model, token_cross_entropy
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from dynammo_peft import DynammoConfig
from dynammo_peft.merging import adapter_tensors, diagonal_fisher, input_grams, merge_adapters


@torch.no_grad()
def lora_model(name="vit", **arguments):
    """A model with two LoRA adapters of random tensors; the first one is active."""
    arguments = {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_dropout": 0.5, **arguments}
    model = get_peft_model(tiny_model(name), LoraConfig(**arguments), "first")
    model.add_adapter("second", LoraConfig(**arguments))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.normal_(generator=torch.Generator().manual_seed(len(key) + 5 * ("second" in key)))
    return model.eval()


def squared_gradients(model, adapter, image, label):
    """Squares of the gradients of one image's cross-entropy, by backward."""
    model.set_adapter(adapter)
    parameters = {key: one for key, one in adapter_tensors(model, adapter).items() if one.requires_grad}
    logits = model(pixel_values=image[None]).logits
    loss = -logits.log_softmax(dim=1)[0, label]
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {key: gradient.double() ** 2 for key, gradient in zip(parameters, gradients)}, logits.softmax(dim=1)[0]


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5 * value.max().item(), msg=key)


@pytest.mark.parametrize("vectorized", [True, False])
def test_fisher_of_given_labels(vectorized):
    model, images, labels = lora_model(), tiny_images("vit", 5), torch.tensor([0, 2, 1, 1, 0])
    # Batches of different sizes: the mean is over images.
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    found = diagonal_fisher(model, "second", batches, vectorized=vectorized)
    rows = [squared_gradients(model, "second", image, label)[0] for image, label in zip(images, labels)]
    assert_same(found, {key: sum(row[key] for row in rows) / 5 for key in rows[0]})
    assert all(value.dtype is torch.float64 for value in found.values())


def test_fisher_of_expected_labels():
    model, images = lora_model(), tiny_images("vit", 3)
    expected = {}
    for image in images:
        for label in range(3):
            squares, probabilities = squared_gradients(model, "first", image, label)
            for key, value in squares.items():
                expected[key] = expected.get(key, 0) + probabilities[label].item() * value / 3
    assert_same(diagonal_fisher(model, "first", [images[:2], images[2:]]), expected)


def test_fisher_of_drawn_labels():
    model, images = lora_model(), tiny_images("vit", 2)
    expected = diagonal_fisher(model, "first", [images])
    drawn = diagonal_fisher(model, "first", [images], draws=100, seed=1)
    for key, value in expected.items():
        # The standard error of a share of 100 draws is at most 5%.
        assert drawn[key].sum().item() == pytest.approx(value.sum().item(), rel=0.2)
    state = torch.random.get_rng_state()
    first = diagonal_fisher(model, "first", [images], draws=3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same(diagonal_fisher(model, "first", [images], draws=3, seed=1), first)


def test_fisher_of_another_loss_and_forward():
    model, images, labels = lora_model(), tiny_images("vit", 3), torch.tensor([0, 2, 1])
    plain = diagonal_fisher(model, "first", [(images, labels)])
    doubled = diagonal_fisher(
        model, "first", [(images, labels)], lambda logits, label: 2 * torch.nn.functional.cross_entropy(logits, label)
    )
    assert_same(doubled, {key: 4 * value for key, value in plain.items()})
    halved = diagonal_fisher(
        model, "first", [(2 * images, labels)], forward=lambda net, x: net(pixel_values=x / 2).logits
    )
    assert_same(halved, plain)


@pytest.mark.parametrize("name", ["resnet_basic", "swin"])
def test_fisher_of_blocks_leaves_out_heads_and_statistics(name):
    model = get_peft_model(tiny_model(name), DynammoConfig(classes=["a", "b"]), "task_000")
    images, labels = tiny_images(name, 3), torch.tensor([0, 1, 1])
    found = diagonal_fisher(model, "task_000", [(images, labels)])
    rows = [squared_gradients(model, "task_000", image, label)[0] for image, label in zip(images, labels)]
    assert_same(found, {key: sum(row[key] for row in rows) / 3 for key in rows[0]})
    assert not any("running" in key or "head" in key for key in found)
    # The tuner alone is enough.
    assert_same(diagonal_fisher(model.base_model, "task_000", [(images, labels)]), found)


@pytest.mark.parametrize("measure", [diagonal_fisher, input_grams])
def test_measuring_changes_nothing(measure):
    model, images = lora_model(modules_to_save=["classifier"]), tiny_images("vit")
    model.train()
    model.base_model.model.vit.layernorm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    modes = {key: module.training for key, module in model.named_modules()}
    state = torch.random.get_rng_state()
    expected = measure(model, "second", [images])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {key: value.requires_grad for key, value in model.named_parameters()} == flags
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert model.active_adapters == ["first"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, torch.nn.Linear))
    # Nor does it depend on what is active, as long as nothing is merged.
    with model.disable_adapter():
        found = measure(model, "second", [images])
        assert model.base_model.model.vit.layers[0].attention.q_proj.disable_adapters
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        measure(model, "second", [images])


@torch.no_grad()
def test_grams_of_what_enters():
    model, images = lora_model(modules_to_save=["classifier"]), tiny_images("vit", 3)
    grams = input_grams(model, "second", [(images[:1], None), images[1:]])
    # LoRA's A and B of two layers in five blocks, and the classifier.
    assert len(grams) == 21
    model.set_adapter("second")
    vit = model.base_model.model.vit
    tokens = vit.layers[0].layernorm_before(vit.embeddings(images)).flatten(0, 1).double()
    key = next(key for key in grams if "layers.0." in key and "q_proj.lora_A" in key)
    torch.testing.assert_close(grams[key], tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-5)
    reduced = tokens @ adapter_tensors(model, "second")[key].double().T
    torch.testing.assert_close(
        grams[key.replace("lora_A", "lora_B")], reduced.T @ reduced / len(reduced), rtol=1e-4, atol=1e-4
    )
    features = vit(pixel_values=images).last_hidden_state[:, 0].double()
    torch.testing.assert_close(
        grams["classifier.modules_to_save.weight"], features.T @ features / 3, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_merge_by_regmean():
    model, images = lora_model(modules_to_save=["classifier"]), tiny_images("vit", 64)
    names = ["first", "second"]
    for name in names:
        torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
    grams = [input_grams(model, name, [images]) for name in names]
    merge_adapters(model, names, combination_type="regmean", grams=grams, off_diagonal=1.0)
    saved = model.base_model.model.classifier.modules_to_save
    features = []
    for name in names:
        model.set_adapter(name)
        features.append(model.base_model.model.vit(pixel_values=images).last_hidden_state[:, 0].double())
    outputs = [inputs @ saved[name].weight.double().T for inputs, name in zip(features, names)]
    # Features sum to about zero: in that direction the weight is free.
    rows = torch.cat(features)
    expected = rows @ torch.linalg.lstsq(rows, torch.cat(outputs), rcond=1e-5, driver="gelsd").solution
    torch.testing.assert_close(rows @ saved["merged"].weight.double().T, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(saved["merged"].bias, (saved["first"].bias + saved["second"].bias) / 2)


def test_unusable_arguments():
    model, images = lora_model(), tiny_images("vit")
    with pytest.raises(ValueError, match="'third' does not exist; there are first, second"):
        diagonal_fisher(model, "third", [images])
    with pytest.raises(ValueError, match="batches holds no images"):
        diagonal_fisher(model, "first", [])
    with pytest.raises(ValueError, match="draws=0 must be at least 1"):
        diagonal_fisher(model, "first", [images], draws=0)
    with pytest.raises(ValueError, match="No linear layer of adapter 'first' was run"):
        input_grams(model, "first", [])
    blocks = get_peft_model(tiny_model("vit"), DynammoConfig(), "task_000")
    with pytest.raises(ValueError, match="'task_000' has no linear layer"):
        input_grams(blocks, "task_000", [images])


def test_batches_of_mappings():
    model, images, labels = lora_model(), tiny_images("vit", 3), torch.tensor([0, 2, 1])
    mapping = [{"pixel_values": images, "labels": labels}]
    assert_same(diagonal_fisher(model, "first", mapping), diagonal_fisher(model, "first", [(images, labels)]))
    assert_same(input_grams(model, "first", mapping), input_grams(model, "first", [images]))


def text_model():
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=13, num_labels=3
    )
    arguments = {"target_modules": ["query", "value"], "r": 2, "init_lora_weights": False}
    torch.manual_seed(0)
    return get_peft_model(BertForSequenceClassification(config), LoraConfig(**arguments), "first").eval()


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_fisher_of_text(vectorized, labelled):
    model = text_model()
    tokens = torch.randint(1, 13, (4, 6), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens}
    if not vectorized:
        batch["attention_mask"] = (torch.arange(6) < torch.tensor([[6], [3], [5], [6]])).long()
    labels = torch.tensor([0, 2, 1, 0])
    own = {key: one for key, one in adapter_tensors(model, "first").items() if one.requires_grad}
    expected = {key: torch.zeros_like(one, dtype=torch.float64) for key, one in own.items()}
    for row in range(4):
        log_probabilities = model(**{key: value[[row]] for key, value in batch.items()}).logits.log_softmax(dim=1)[0]
        for label in [labels[row].item()] if labelled else range(3):
            gradients = torch.autograd.grad(log_probabilities[label], list(own.values()), retain_graph=True)
            share = 1.0 if labelled else log_probabilities[label].exp().item()
            for key, gradient in zip(own, gradients):
                expected[key] += share * gradient.double().square() / 4
    given = {**batch, **({"labels": labels} if labelled else {})}
    batches = [{key: value[rows] for key, value in given.items()} for rows in (slice(0, 3), slice(3, 4))]
    assert_same(diagonal_fisher(model, "first", batches, vectorized=vectorized), expected)


def test_what_vmap_cannot_do_is_said():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    with pytest.raises(ValueError, match="attention masks.* set vectorized=False"):
        diagonal_fisher(text_model(), "first", [batch])


def test_grams_of_text():
    model = text_model()
    tokens = torch.randint(1, 13, (4, 6), generator=torch.Generator().manual_seed(1))
    grams = input_grams(model, "first", [{"input_ids": tokens, "labels": torch.zeros(4, dtype=torch.long)}])
    with torch.no_grad():
        rows = model.get_base_model().bert.embeddings(tokens).flatten(0, 1).double()
    gram = next(value for key, value in grams.items() if "query.lora_A" in key)
    torch.testing.assert_close(gram, rows.T @ rows / 24, rtol=1e-4, atol=1e-5)


def test_fisher_of_a_tensor_that_layers_share():
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], trainable_token_indices=[3, 4], r=2)
    model = get_peft_model(tiny_language_model(), lora, "a").eval()
    tokens = torch.tensor([[3, 5, 4, 7], [4, 4, 3, 9]])
    batches = [{"input_ids": tokens, "labels": tokens}]
    before = dict(model.named_parameters(remove_duplicate=False))
    found = diagonal_fisher(model, "a", batches, token_cross_entropy, vectorized=False)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    # Through the embeddings and the tied layer behind the last block together.
    parameters = adapter_tensors(model, "a")
    (shared,) = [key for key in parameters if "trainable_tokens" in key]
    rows = []
    for row in tokens:
        value = token_cross_entropy(model(input_ids=row[None]).logits, row[None])
        rows.append(torch.autograd.grad(value, list(parameters.values())))
    assert_same(found, {key: sum(row[i].double() ** 2 for row in rows) / 2 for i, key in enumerate(parameters)})
    assert found[shared].max() > 0


def test_fisher_needs_a_label_for_each_image():
    for vectorized in (True, False):
        with pytest.raises(ValueError, match="has 4 images and 3 labels; give a label for each"):
            batches = [(tiny_images("vit", 4), torch.zeros(3).long())]
            diagonal_fisher(lora_model(), "first", batches, vectorized=vectorized)


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("vectorized", [True, False])
def test_fisher_needs_labels_of_the_model(vectorized, label):
    batches = [(tiny_images("vit"), torch.tensor([1, label]))]
    with pytest.raises(ValueError, match=f"labels from {min(label, 1)} to {max(label, 1)}, and not all of them"):
        diagonal_fisher(lora_model(), "first", batches, vectorized=vectorized)


@pytest.mark.parametrize("measure", [diagonal_fisher, input_grams])
def test_a_model_without_adapters_is_not_measured(measure):
    with pytest.raises(ValueError, match="A ViTForImageClassification is no model with PEFT's adapters"):
        measure(tiny_model("vit"), "a0", [tiny_images("vit")])


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_model_of_any_library_is_measured(vectorized):
    # It takes images by position, as timm's do, and gives plain logits.
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    model = get_peft_model(plain, LoraConfig(target_modules=["1"], r=2, init_lora_weights=False), "first").eval()
    images, labels = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1])
    parameters = adapter_tensors(model, "first")
    expected = dict.fromkeys(parameters, 0.0)
    for image, label in zip(images, labels):
        loss = -model(image[None]).log_softmax(dim=1)[0, label]
        for key, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values()))):
            expected[key] = expected[key] + gradient.double() ** 2 / 4
    assert_same(diagonal_fisher(model, "first", [(images, labels)], vectorized=vectorized), expected)
    (gram,) = (value for key, value in input_grams(model, "first", [images]).items() if "lora_A" in key)
    torch.testing.assert_close(gram, images.flatten(1).double().T @ images.flatten(1).double() / 4)
