"""Phi-3-Vision computed a second time: numpy and plain torch on a dict of tensors, in loops, one row at a time."""

import math

import numpy as np
import torch
from PIL import Image

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
TOWER = "vision_embed_tokens.img_processor.vision_model."


def canvas(image, num_crops, edge):
    """The resized image between white bars, (H, W, 3) bytes; an upright image is handled lying."""
    pixels = np.asarray(image.convert("RGB"))
    upright = pixels.shape[0] > pixels.shape[1]
    if upright:
        pixels = pixels.swapaxes(0, 1)
    height, width, _ = pixels.shape
    ratio, along = width / height, 1
    while along * math.ceil(along / ratio) <= num_crops:
        along += 1
    along -= 1
    new_height = max(1, int(along * edge / ratio))
    lying = Image.fromarray(np.ascontiguousarray(pixels)).resize((along * edge, new_height), Image.BILINEAR)
    rows = math.ceil(new_height / edge)
    full = np.full((rows * edge, along * edge, 3), 255, np.uint8)
    top = int((rows * edge - new_height) / 2)
    full[top : top + new_height] = np.asarray(lying)
    return full.swapaxes(0, 1) if upright else full


def cubic_weights(size, target):
    """(target, size) matrix of bicubic interpolation without antialiasing, a = -0.75, half-pixel centres."""

    def kernel(distance, a=-0.75):
        d = abs(distance)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    weights = np.zeros((target, size))
    for i in range(target):
        source = (i + 0.5) * size / target - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            weights[i, min(max(tap, 0), size - 1)] += kernel(source - tap)
    return weights


def crops(image, num_crops, edge):
    """The whole and the crops, (1 + n, 3, edge, edge), and the grid (rows, columns)."""
    values = (canvas(image, num_crops, edge) / 255 - MEAN) / STD
    rows, columns = values.shape[0] // edge, values.shape[1] // edge
    down, across = cubic_weights(values.shape[0], edge), cubic_weights(values.shape[1], edge)
    cut = [np.stack([down @ values[..., c] @ across.T for c in range(3)])]
    for row in range(rows):
        for column in range(columns):
            piece = values[row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
            cut.append(piece.transpose(2, 0, 1))
    return torch.tensor(np.stack(cut)), (rows, columns)


def norm(x, state, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    bias = state.get(f"{name}.bias")
    return x @ state[f"{name}.weight"].T + (0 if bias is None else bias)


def patches(picture, state, config, prefix=TOWER):
    """Features of the patches of one crop (patches, width): the last hidden state but one, no class token."""
    vision, size = config.vision_config, config.vision_config.patch_size
    kernel = state[f"{prefix}embeddings.patch_embedding.weight"].flatten(1)
    tokens = [state[f"{prefix}embeddings.class_embedding"]]
    for top in range(0, picture.shape[1], size):
        for left in range(0, picture.shape[2], size):
            patch = picture[:, top : top + size, left : left + size]
            tokens.append(kernel @ patch.flatten())
    x = torch.stack(tokens) + state[f"{prefix}embeddings.position_embedding.weight"]
    x = norm(x, state, f"{prefix}pre_layrnorm", vision.layer_norm_eps)
    heads = vision.num_attention_heads
    width = vision.hidden_size // heads
    for layer in range(vision.num_hidden_layers - 1):
        name = f"{prefix}encoder.layers.{layer}"
        y = norm(x, state, f"{name}.layer_norm1", vision.layer_norm_eps)
        q, k, v = (linear(y, state, f"{name}.self_attn.{part}_proj") for part in "qkv")
        mixed = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            mixed.append(torch.softmax(q[:, own] @ k[:, own].T / width**0.5, dim=-1) @ v[:, own])
        x = x + linear(torch.cat(mixed, dim=-1), state, f"{name}.self_attn.out_proj")
        y = linear(norm(x, state, f"{name}.layer_norm2", vision.layer_norm_eps), state, f"{name}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), state, f"{name}.mlp.fc2")
    return x[1:]


def merged(features, rows, columns):
    """Lines of the grid of crops: at each place four neighbouring patches side by side, row by row."""
    side = math.isqrt(features[0].shape[0])
    lines = []
    for y in range(0, rows * side, 2):
        line = []
        for x in range(0, columns * side, 2):
            four = []
            for down in (y, y + 1):
                for right in (x, x + 1):
                    crop = features[(down // side) * columns + right // side]
                    four.append(crop[(down % side) * side + right % side])
            line.append(torch.cat(four))
        lines.append(line)
    return lines


def image_embeddings(image, state, config, num_crops):
    """Embeddings of an image (tokens, hidden): lines of its crops, separator, lines of the whole; sub_GN ends each."""
    pieces, (rows, columns) = crops(image, num_crops, config.vision_config.image_size)
    features = [patches(piece.to(state["norm.weight"].dtype), state, config) for piece in pieces]
    newline = state["vision_embed_tokens.sub_GN"][0, 0, 0]
    sequence = []
    for line in merged(features[1:], rows, columns):
        sequence += [*line, newline]
    sequence.append(state["vision_embed_tokens.glb_GN"][0, 0])
    for line in merged(features[:1], 1, 1):
        sequence += [*line, newline]
    name = "vision_embed_tokens.img_projection"
    x = linear(torch.stack(sequence), state, f"{name}.0")
    return linear(x * 0.5 * (1 + torch.erf(x / 2**0.5)), state, f"{name}.2")


def rope(length, config):
    """Angles (length, half a head) and the factor of cosines and sines."""
    half = config.hidden_size // config.num_attention_heads // 2
    limit, most = config.original_max_position_embeddings, config.max_position_embeddings
    factors = config.rope_parameters["long_factor" if length > limit else "short_factor"]
    base = config.rope_parameters["rope_theta"]
    angles = torch.zeros(length, half, dtype=torch.float64)
    for place in range(length):
        for i in range(half):
            angles[place, i] = place / (factors[i] * base ** (i / half))
    return angles, math.sqrt(1 + math.log(most / limit) / math.log(limit))


def turned(x, angles, scale):
    half = x.shape[-1] // 2
    first, second = x[:, :half], x[:, half:]
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms(x, weight, eps):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def hidden_states(x, state, config):
    """Last hidden states (length, hidden) of one unpadded row of input embeddings."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    angles, scale = rope(len(x), config)
    angles = angles.to(x.dtype)
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        y = rms(x, state[f"{name}.input_layernorm.weight"], config.rms_norm_eps)
        qkv = linear(y, state, f"{name}.self_attn.qkv_proj")
        q, k, v = qkv.split([heads * width, groups * width, groups * width], dim=-1)
        mixed = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            group = head * groups // heads
            shared = slice(group * width, (group + 1) * width)
            scores = turned(q[:, own], angles, scale) @ turned(k[:, shared], angles, scale).T / width**0.5
            for place in range(len(x)):
                scores[place, place + 1 :] = -torch.inf
            mixed.append(torch.softmax(scores, dim=-1) @ v[:, shared])
        x = x + linear(torch.cat(mixed, dim=-1), state, f"{name}.self_attn.o_proj")
        y = rms(x, state[f"{name}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = linear(y, state, f"{name}.mlp.gate_up_proj").chunk(2, dim=-1)
        x = x + linear(up * gate * torch.sigmoid(gate), state, f"{name}.mlp.down_proj")
    return rms(x, state["norm.weight"], config.rms_norm_eps)


def tensor_names(config):
    """Names of the tensors of a published checkpoint, with so many layers."""
    names = {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(config.num_hidden_layers):
        names |= {
            f"model.layers.{layer}.{part}.weight"
            for part in (
                "input_layernorm",
                "mlp.down_proj",
                "mlp.gate_up_proj",
                "post_attention_layernorm",
                "self_attn.o_proj",
                "self_attn.qkv_proj",
            )
        }
    images = "model.vision_embed_tokens."
    names |= {f"{images}glb_GN", f"{images}sub_GN"}
    names |= {f"{images}img_projection.{place}.{kind}" for place in (0, 2) for kind in ("bias", "weight")}
    tower = f"{images}img_processor.vision_model."
    names |= {
        f"{tower}embeddings.class_embedding",
        f"{tower}embeddings.patch_embedding.weight",
        f"{tower}embeddings.position_embedding.weight",
    }
    names |= {f"{tower}{part}.{kind}" for part in ("pre_layrnorm", "post_layernorm") for kind in ("bias", "weight")}
    for layer in range(config.vision_config.num_hidden_layers):
        names |= {
            f"{tower}encoder.layers.{layer}.{part}.{kind}"
            for part in (
                "layer_norm1",
                "layer_norm2",
                "mlp.fc1",
                "mlp.fc2",
                "self_attn.k_proj",
                "self_attn.out_proj",
                "self_attn.q_proj",
                "self_attn.v_proj",
            )
            for kind in ("bias", "weight")
        }
    return names
