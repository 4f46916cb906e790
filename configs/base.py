"""Every key a run can have, with its unit and its default; other configs only change values."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Return the defaults.

    Returns:
      ConfigDict; lock it after changing values so that no key can be invented.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_steps = 1000  # optimizer steps of the whole run
    config.num_micro_batches = 1  # parts a batch is split into to save memory
    config.eval_every_steps = 100  # steps between two validations
    config.num_eval_batches = 8  # 0 = the whole validation split
    config.log_every_steps = 10  # steps between two progress lines
    config.max_consecutive_skips = 5  # non-finite steps in a row before the run stops
    config.label_smoothing = 0.0  # share of a target spread over all classes, in training only

    model = config.model = ml_collections.ConfigDict()
    model.vocab_size = 0  # 0 = as many as the data has; more is allowed, fewer refused
    model.num_layers = 4
    model.model_dim = 128
    model.num_heads = 4
    model.num_kv_heads = 0  # 0 = num_heads
    model.mlp_dim = 512
    model.num_decoder_layers = 0  # above 0 an encoder-decoder, for translation
    # or "relu"; or "geglu", "swiglu": gated, of which mlp_dim is one half
    model.mlp_activation = "gelu"
    model.positions = "learned"  # or "rotary"
    model.dropout_rate = 0.0
    model.init_std = config_dict.placeholder(float)  # None = LeCun-normal kernels
    model.dtype = "float32"  # activations; parameters are always float32
    model.remat = False  # recompute blocks in the backward pass
    model.scan_layers = True  # compile one block for all layers
    model.use_bias = True  # biases in linear layers; norms keep theirs
    model.embedding_norm = False  # normalise the sum of embedding and position
    model.block_size = 64  # side of an attention block, positions
    # None = the best kernel for the device: "mosaic_sm90", "xla", "dense" or "reference"
    model.attention_implementation = config_dict.placeholder(str)
    # None = the best kernel for sparse weights: "mosaic_sm90", "xla" or "reference"
    model.weight_implementation = config_dict.placeholder(str)

    data = config.data = ml_collections.ConfigDict()
    # stdlib | text:/path | listops | listops:short | pathfinder | idx:/folder | tfds:name |
    # aan:/folder | pairs:/folder
    data.source = "stdlib"
    data.data_dir = "~/.cache/sparsejax"  # prepared data sets and tokenizers
    data.tokenizer = "bytes"  # or "bpe:4096", trained on the training split
    data.sequence_length = 1024  # positions: tokens, pixels or patches
    data.batch_size = 8  # examples per step over all processes
    data.num_reading_threads = 0  # 0 or 1
    data.truncate = False  # cut longer examples (classes, translation) instead of refusing them
    data.download = False  # let tensorflow_datasets download a set that is not prepared
    data.train_split = ""  # empty = the source's own; "train[:90%]" works with tfds
    data.validation_split = ""  # empty = the source's own
    data.input_key = ""  # tfds feature to read, empty = the one the set declares
    data.label_key = ""  # tfds label to predict, empty = the one the set declares
    data.image_size = 0  # side that the middle square of images is scaled to, pixels; 0 = as stored
    data.validation_fraction = 0.05  # share of a text corpus held out
    data.listops_examples = 96_000  # training examples of ListOps
    data.pathfinder_examples = 160_000  # training examples of Pathfinder
    # Share of a corpus's tokens that is hidden and has to be told (masked language model); 0 = the
    # next token has to be told
    data.mask_fraction = 0.0
    data.patch_size = 0  # side of the patches of images, pixels; 0 = grey pixels, one by one
    data.image_channels = 0  # of images in patches, 1 or 3; 0 = what they have
    data.random_crop = False  # train on random parts of images in patches, scaled to the whole
    data.random_flip = False  # swap left and right of images in patches, half of the time

    optimizer = config.optimizer = ml_collections.ConfigDict()
    optimizer.name = "adamw"  # or "lion", "sgd"
    optimizer.learning_rate = 1e-3  # peak
    optimizer.schedule = "cosine"  # or "one_cycle", "inverse_sqrt", "wsd", "constant", "triangle"
    optimizer.warmup_steps = 100
    optimizer.final_fraction = 0.1  # last rate of "cosine" and "wsd" relative to the peak
    optimizer.decay_fraction = 0.2  # share of the run, at its end, in which "wsd" falls
    optimizer.initial_fraction = 0.0  # first rate of "triangle" relative to the peak
    optimizer.weight_decay = 0.1  # decoupled, kernels and token embeddings only
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.clip_norm = 1.0  # None = off
    optimizer.clip_value = config_dict.placeholder(float)  # None = off

    recipe = config.recipe = ml_collections.ConfigDict()
    recipe.name = "dense"  # or "spion", "sat", "static_attention", "fst", "sste", "mst",
    # "rigl", "set", "magnitude", "static"

    spion = recipe.spion = ml_collections.ConfigDict()
    spion.variant = "cf"  # "cf", "c" or "f"
    spion.quantile = config_dict.placeholder(float)  # threshold of the flood fill: "cf", "f"
    spion.density = config_dict.placeholder(float)  # fraction of blocks kept: "c"
    spion.filter_size = 31  # positions, odd
    spion.probe_every_steps = 100  # steps between two checks of the attention maps
    spion.max_change_percent = 15  # the switch needs every layer's change below this
    spion.keep_map_at_second_check = True  # as the released code
    # Warm up again after the switch; None = as the released code, "cf" and "c" do
    spion.restart_learning_rate = config_dict.placeholder(bool)
    spion.pruned_logits = "zero"  # or "masked"
    spion.latest_switch_step = config_dict.placeholder(int)  # ours: switch then at the latest

    sat = recipe.sat = ml_collections.ConfigDict()
    sat.density = 0.05  # fraction of visible blocks that a layer keeps
    sat.min_skewness = 1.7  # the switch needs every layer's map to be as skewed
    sat.max_change_percent = 1.3  # and every layer's change below this
    sat.probe_every_steps = 1  # steps between two looks at the maps; above 1 is ours
    sat.map_decay = 0.0  # weight of earlier maps in an average; above 0 is ours
    sat.pattern_dim = config_dict.placeholder(int)  # inner size of W; None = width of a head
    sat.continue_schedule = False  # False as the released code: fresh optimizer, half the peak rate
    sat.pruned_logits = "zero"  # or "masked"
    sat.latest_switch_step = config_dict.placeholder(int)  # ours: switch then at the latest

    static = recipe.static_attention = ml_collections.ConfigDict()
    static.pattern = "sliding_window"  # or "longformer", "bigbird"
    static.density = 0.1  # fraction of visible blocks kept
    static.dense_steps = 0  # dense steps before the pattern applies
    static.pruned_logits = "masked"  # or "zero"

    fst = recipe.fst = ml_collections.ConfigDict()
    fst.variant = "fst"  # or its rivals "sr_ste", "ste"; "dense" prunes nothing, follows masks
    # Ordered "regex=pattern; regex=pattern" over attention/qkv, attention/out, mlp/up, mlp/down,
    # and of an encoder-decoder decoder/mlp/up, decoder/mlp/down
    fst.sparse_weights = "mlp/.*=2:4 transposable"
    fst.decay_rate = 6e-5  # lambda_W, pull of pruned weights to zero, in gradient units
    # Rates that --mode=find_decay tries
    fst.decay_candidates = "1e-6 2e-6 6e-6 1e-5 2e-5 6e-5 1e-4 2e-4 6e-4 1e-3 2e-3 6e-3"
    fst.refresh_steps = 40  # steps between two searches for masks
    fst.grad_pruning = "none"  # or "mvue", "mvue_exact": sparse dW
    fst.dense_fraction = 1 / 6  # share of the steps, at the end, that train densely

    sste = recipe.sste = ml_collections.ConfigDict()
    sste.sparse_weights = "mlp/.*=2:4"  # as in fst
    sste.grad_pruning = "none"  # or "mvue", "mvue_exact": sparse dW
    sste.flip_interval_steps = 40  # steps between the masks that a flip rate compares

    # Dynamic sparse training. Sparsities are of the chosen weights together. The schedule is ours,
    # for that of the paper is not known.
    mst = recipe.mst = ml_collections.ConfigDict()
    mst.sparse_weights = ".*=unstructured"  # layers as in fst
    mst.sparsity = 0.9  # fraction removed in the ultra-sparse phase
    mst.final_sparsity = 0.0  # fraction removed at the end
    mst.warmup = 0.1  # share of the run in which the sparsity climbs
    mst.restoration = 0.13  # share of the run in which it falls
    # Jumps of the warm-up; None climbs linearly
    mst.stairs = config_dict.placeholder(int)
    mst.stairs = 10
    mst.update_fraction = 0.3  # of the kept weights replaced by an update, at the start of a phase
    mst.update_interval = 100  # steps from one update to the next
    mst.growth = "mixed"  # or "gradient", "random"
    mst.mix = 3  # weights grown by gradient for each grown at random
    mst.layer_density = "erdos_renyi"  # or "erk" (the same here), "uniform"
    # Optimizer moments of grown weights: "stale" as released, "zero", or "mean" of their layer's
    mst.moments = "stale"
    mst.keep_optimizer_step = False  # False as released: an update takes the place of a step
    # The learning rate of sparse weights is multiplied by density^-p; 0 as published, 1 as SuPar
    mst.rate_exponent = 0.0
    # Stride of hybrid sparse attention in the ultra-sparse phase, positions; None = dense attention
    mst.attention_stride = config_dict.placeholder(int)
    # True keeps the whole blocks that hold the pattern, for speed; the stride is then a multiple of
    # model.block_size. False keeps the positions alone, by masked dense products.
    mst.attention_blocks = False
    mst.restore_attention = True  # False: the pattern stays to the end, and in the trained model

    rigl = recipe.rigl = ml_collections.ConfigDict()
    rigl.sparse_weights = ".*=unstructured"  # layers as in fst
    rigl.sparsity = 0.8  # fraction removed
    rigl.update_fraction = 0.3  # of the kept weights replaced by the first update
    rigl.update_interval = 100  # steps from one update to the next
    rigl.end_fraction = 0.75  # updates end after this share of the run
    rigl.layer_density = "erdos_renyi"  # or "erk" (the same here), "uniform"
    rigl.initial_mask = "random"  # or "magnitude"
    rigl.moments = "zero"  # optimizer moments of grown weights; or "stale", "mean"
    rigl.keep_optimizer_step = False  # False as published: an update takes the place of a step
    rigl.rate_exponent = 0.0  # as of mst

    dst_set = recipe.set = ml_collections.ConfigDict()
    dst_set.sparse_weights = ".*=unstructured"  # layers as in fst
    dst_set.sparsity = 0.8  # fraction removed
    dst_set.update_fraction = 0.3  # of the kept weights replaced by every update
    dst_set.update_interval = 100  # steps from one update to the next
    dst_set.end_fraction = 1.0  # updates end after this share of the run
    dst_set.layer_density = "erdos_renyi"  # or "erk" (the same here), "uniform"
    dst_set.initial_mask = "random"  # or "magnitude"
    dst_set.moments = "zero"  # optimizer moments of grown weights; or "stale", "mean"
    dst_set.rate_exponent = 0.0  # as of mst

    magnitude = recipe.magnitude = ml_collections.ConfigDict()
    magnitude.sparse_weights = ".*=unstructured"  # layers as in fst
    magnitude.sparsity = 0.8  # fraction removed in the end
    magnitude.start_fraction = 0.1  # pruning begins after this share of the run
    magnitude.end_fraction = 0.75  # and ends after this one
    magnitude.update_interval = 100  # steps from one pruning to the next
    magnitude.layer_density = "uniform"  # or "erdos_renyi", "erk"
    magnitude.rate_exponent = 0.0  # as of mst

    static_weights = recipe.static = ml_collections.ConfigDict()
    static_weights.sparse_weights = ".*=unstructured"  # layers as in fst
    static_weights.sparsity = 0.8  # fraction removed
    static_weights.layer_density = "erdos_renyi"  # or "erk" (the same here), "uniform"
    static_weights.initial_mask = "random"  # or "magnitude"
    static_weights.rate_exponent = 0.0  # as of mst

    checkpoint = config.checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 100
    checkpoint.keep_last = 2
    checkpoint.keep_best = 1  # by validation loss
    return config
