"""The glossary: every noun of the code that is not torch's or Python's, each with one meaning.

csrc/: kernels
    kernel            a C++, CUDA or Triton function that updates the elements of chunks
    chunk             a run of elements for one CPU task, CUDA block or Triton program
    block             CUDA's block of threads
    descriptor        a chunk of one average with its pointers, in 64 bytes, as a GPU's block reads it
    blend             a weight in the forms that the lerp of one element needs

torch_private/: names that are private in torch
    walk              a path through a module that finds its tensors again quickly
    place             where a module holds one of its tensors
    flat param        the 1-D tensor in which an FSDP1 module keeps its params
    flat shard        this rank's shard of one original param in a flat param

terms/: ints, names and numbers
    model             the module that is trained
    param             one of the model's live tensors
    buffer            a buffer of an ``nn.Module``, nothing else
    average           the running average of a param, which we own
    averaged model    the averages of one model, with their rule and their counter
    rule              how the weight follows from the number of updates
    weight            the interpolation weight of the newest param, as in ``torch.lerp``
    decay             ``1 - weight`` of an exponential average
    terms             the numbers from which a kernel computes a rule's weight
    update            one call of ``update_parameters``
    step              a step of the optimizer, never of ours
    num_averaged      number of models in the average; the state-dict key is ``n_averaged``, as in torch
    counter           the int64 tensor on the device that holds ``num_averaged``
    format            how an average is stored
    plane             one of a format's tensors; plane 0 is the averaged module's own param
    remainder         the plane with the bits that plane 0 leaves out
    spread            the variance of an average, and the last deviations of params from it
    column            one of the deviations; the update of n models writes the column n % K
    sample            a point near an average, by the spread and normal numbers
    seed              the user's number from which random bits follow
    draws             what the random bits of one average depend on
    random key        64 bits made from the seed and a param's name
    box               a rectangle of a tensor, with one offset and one size for each dimension
    run               consecutive elements in memory
    grid              how many blocks a launch on a GPU has, and how wide they are
    order             a tensor's dimensions, the slowest in memory first
    extent            number of elements in memory from the first to the last that a tensor touches
    bucket            one flat allocation that holds planes of one device and dtype
    slot              where one plane lies in a bucket
    key               what something is looked up by; in a state, the name of an entry
    package           the public package under which a class is pickled
    made on use       an attribute that is made on its first use
    checked           an attribute that is checked whenever it is set
    hint              the end of an error: the line that a user meant
    with hints        base class whose errors about attributes that it lacks end with a hint

backends/: tensors in, tensors changed
    backend           ``reference``, ``cpu``, ``cuda`` or ``triton``
    unavailable       the reason why a backend cannot run here
    pair              one param and its average
    point             a sample as the C interface takes it
    ring              the addresses of the columns of one average, and their dtype
    pace              the rule and counter of one averaged model, which tell how far its averages move
    launch            pairs prepared for one backend, to be updated repeatedly
    row               one pair as a kernel of the CPU reads it, and as descriptors are made of it
    signature         the arguments and the result of one function of the native library
    follower          a row that averages the same param as the row before it
    table             the descriptors and state words of one launch on one GPU
    head              the C struct that points to the parts of a table
    words             the memory of a tensor as integers
    flag              one int64 that is set if any rank has found a NaN or an infinity
    window            the elements or bytes that are processed at a time
    tile              the elements that a Triton program moves at a time

loop/: averages that follow an optimizer
    attachable        an averaged model that can be attached to an optimizer
    attachment        an averaged model that follows an optimizer's steps
    roster            the attachments whose states are in one optimizer's state dict
    enrolled          what a roster needs of an attachment
    schedule          the steps after which an attachment updates
    span              a time in steps, epochs or a share of the training, as the user writes it
    runner            runs an attachment's updates: plain, on streams or in a thread
    plain             the runner that updates in the optimizer's hook
    on streams        the runner that updates on side streams of the GPUs
    in thread         the runner that updates in a thread
    ready             a function that prepares an update and returns it
    stand-in          a copy of a model's module tree, for an update beside the next forward
    waiting           what a wait needs of an attachment
    wait              the hook by which an averaged module's forward waits for an update under way
    guard             lets one thread at a time use an averaged model, and none while it is swapped
    lock              what a guard holds; it is new in a forked child
    context           a seamless one runs no Python between a ``with`` statement and its generator
    method            that of a seamless context, found without a call of Python
    closing           what leaves a seamless context, in C
    swap              one use of ``swapped_into``; it is in force until the averages are back
    exchanged         what a swap needs of the exchange that it undoes
    refusal           hook of an averaged module: refuses its use while its swap is in force
    updating          what an attachment and its runner need of an averaged model
    together          what a guard needs of ranks that act together

strict/: pickles of torch's files, read without running them
    unpickler         reads a pickle, and makes nothing of it but tensors, sizes and plain values
    opcodes           what each opcode of a pickle does, for so many of them
    opaque            an object in a pickle that is not made
    strided view      a tensor in a file of ``torch.save``: elements of a storage, with strides
    storage key       the name under which a file of ``torch.save`` has a storage
    chunked tensor    a tensor in chunks, as ``torch.distributed.checkpoint`` stores it
    listing           what the list of a distributed checkpoint has, and where

op/: one update, planned and launched
    plan              the pairs of an update, with their averages in buckets and their work
    work              the pairs of a plan that one backend updates
    launches          the work of one update, and how it runs
    fingerprint       addresses, shapes and dtypes of tensors, to see whether a plan still fits
    tree check        a native pass over module trees, which tells whether a plan still fits their tensors
    checks            the tree check of one plan, made again where only the checks in Python know that the plan fits
    functions         those of ``csrc/python/trees.cpp``, for a tree check
    plane like        the shape, strides, dtype and device of a plane to be made
    copies            the pairs that torch copies beside a plan, since no kernel takes them
    home              the address of a plane whose memory was made for it, so that no plan moves it
    exchange          params and averages that change places
    drawing           a sample with the seed of its normal numbers, to be drawn: written into a model's params
    draws sample      an exchange that puts a sample into the model, and leaves the averages as they are
    places point      an exchange that puts a point of a subspace into the model, and sets gradients aside
    replaced          params that have their copies during a swap, and the way back
    moved             the way back of an exchange whose memory has moved
    located           what an exchange needs of a binding: where its tensors are now
    checksum          64 bits of a tensor; the checksums of its boxes sum to it

average/: averaged models of one process
    side              one of the averaged models that are updated together
    owner             the module that holds a side's planes and counter
    binding           a plan, and the way to the tensors that it was made for; ``Bindings`` keeps the last ones
                      used and those that a CUDA graph holds
    uncounted         an average in which no model is counted yet, and what has been written into it
    has rule          base class of an averaged model whose rule may be set, as torch's averaging functions may
    by rule alone     an attribute of torch's class that one which is updated by rules alone does not have
    mark              marks a param of the averaged module as lent, by its storage
    holds models      base class of one averaged model, which says so where it is used before it holds a model
    chosen            an attribute that says what was asked for, or else what was chosen
    described         base class of one averaged model, which describes itself in one line
    tree              planes under dotted names, as a module
    model copy        stands for a model while it is deep-copied, and makes the averages of the copy
    lent              a frozen param of the averaged module that stands on the model's memory
    loan              the lent params of one plan, and the others that it leaves out because they are frozen
    subspace          the points average + sum of t[i] * direction[i], with few coordinates t
    has points        what a subspace needs of the averaged model whose columns span it
    has subspaces     base class of one averaged model of whose deviations a subspace may be made
    placed            the same, in one process
    has samples       base class of one averaged model of which samples may be drawn
    sampled           the same, in one process
    holds planes      base class of one averaged model, which knows where its planes lie
    recast            a move or cast of an averaged model to another device or dtype
    cast              an average in another dtype: what was and what is to be in its place
    adaptable         base class of one averaged model that can take over a model that has grown
    adapted           a new average of a grown model, which has taken the averages of an old one
    late copy         stands for a tensor during a load, and keeps what is to be copied into it afterwards
    way back          what a load may change, noted before it, to put it back if the load fails

sharded/parts/: what one rank holds, and how ranks communicate
    ranks             our own process group, shared by all averages over one of the user's groups
    subgroup          the ranks of one cut, if these are not all ranks
    counting          ranks that compare counts in the actions that they take together
    one process       the ranks of a process without a process group
    number            distinguishes averaged models that share their ranks
    fault             why no more collectives may run
    lost peer error   the error that a fault raises
    rendezvous        turns in which ranks exchange messages through the store of the user's group
    turn              one exchange of a rendezvous
    seat              one rank's view of our process group over one of the user's
    mesh              torch's ``DeviceMesh`` as plain ints and names
    sharding          how a tensor is spread over ranks: mesh and placements, replicated, or in runs (FSDP1, ZeRO-3)
    replica           a rank that holds the same elements as another one
    shard             this rank's part of a param that is sharded
    holding           what this rank holds of one param or buffer, in ints
    held              a holding with its tensor
    working run       this rank's run of a param that ZeRO-3 has partitioned, which a forward pass gathers
    masters           what ZeRO-3's optimizer steps on this rank: float32 of the params of one group, in one tensor
    part              one rank's piece of something that is cut
    share             the part of a holding that this rank averages
    cut               params that the same ranks hold alike, cut evenly over these ranks
    flat order        tensors one after the other, cut evenly into parts
    part tensor       a part in the form that ``torch.distributed.checkpoint`` takes
    all-gather        fills the params of one cut on all ranks with the parts of all ranks
    piece             the bytes that one rank sends in one window of an all-gather

sharded/: averages of models that are spread over ranks
    strict reader     reads distributed checkpoints as torch does, and unpickles nothing
    locator           finds the tensors of this rank's shares again
    views             the params of a plan, viewed on access
    bound             a plan with its current params and planes
    staging           copies of what a forward writes, for an update beside it; on the host, of params too
    entry             one plane or buffer in a state, under one key or under those of tied params
    seal              checksum and dtype of an entry, in the state
    adaptable shards  base class of one averaged model of shards that can take over a model that has grown
    draws shards      an exchange that puts a sample into the model, a part on each rank
    places shards     an exchange that puts a point of a subspace into the model, a part on each rank
    exchanges runs    an exchange of runs that ZeRO-3 gathers in a forward; ``DrawsRuns`` and ``PlacesRuns`` likewise
    placeable shards  base class of one averaged model of shards of whose deviations a subspace may be made
    usable shards     base class of one averaged model of shards that can be put into a model, or a sample of it
    has full states   base class of one averaged model of shards: its states of whole tensors
    pending load      one rank's parts of a state, until they are verified and written

posthoc/: averages made after training
    snapshot          averages stored at one count; ``Snapshots`` is a folder of them
    sidecar           the file that describes a snapshot
    stored average    one average of one snapshot
    stored tensor     name, shape and dtype of a param or buffer in a snapshot
    stored part       one rank's part of one stored tensor
    wanted tensor     a tensor to be summed up from snapshots
    sum               a weighted sum of stored averages
    profile           the weight of each model in an average
    merge             a weighted sum of a few models or averages, with coefficients that are known
    greedy merge      one of those models whose mean scores best
    merged            a tensor that is to be the same on all workers
    worker            one rank, or several that share a model, whose model is trained beside those of others
    has merges        base class of ``Snapshots``: merges of what is stored
    fit               the sum of stored averages that is nearest to a wanted average

files/: checkpoints in files
    candidate         a checkpoint that may be selected
    selected          a checkpoint to be averaged, with its step and its metric
    counted           what the name of a checkpoint counts: a step or an epoch
    metrics           the values of one field for the checkpoints of a folder
    progress          how far a run is, in bytes
    checkpoint        tensors by name in one or several files, which are read a piece at a time
    output            a checkpoint that is being written, beside its place
    tensor spec       name, dtype and shape of a tensor in a file
    packed error      tensors of a file have elements of less than a byte
    input file        a file that several threads read, open as long as there is room
    header            what a safetensors file holds, and where
    scanner           reads the JSON of a header, one entry at a time
    unfinished        a safetensors file of an output, open until its last byte is there
    agreed            a tensor of an output, with its names and dtypes in the inputs
    pass              one run over all inputs: it reads, sums, rounds and writes
    summing           what sums up one chunk at a time: the native library, numpy or torch
    advancing         what is told how many bytes are done
    report            what an average of checkpoints has done, or would do
    call              a global that a pickle names, with what a load calls it with
    archive           the zip file of one ``torch.save``, which may be part of a file
    archive layout    an archive of which the bytes of storages come later
    region            a tensor's elements in a file
    given up          what is being replaced stays as it is
    counted state     a state of averages, with their counts
    mapped state      the values of a state in a file that is mapped into memory
    keys of average   where a state has the planes of one average
    combined          what a merge or a window of files has written

optim/: recipes of papers and of other packages
    swa               torchcontrib's optimizer of that name, and Composer's algorithm
    clock             the steps after which Composer's SWA updates
    cycles            a learning rate schedule that repeats
    triangle          a rate that falls and rises linearly
    cosine            a rate that falls as a cosine, and then repeats its last steps
    low precision     weights, gradients and momentum of a few bits, as in SWALP
    low precision mean  their equal mean, kept in a few bits too
    rounding          how numbers become integers; as a class, that of activations and errors
    accumulator       what an optimizer's step adds to, where weights are made of it
    noise             the random numbers of one step of low precision
    uniform weight    a weight of evenly spaced values, and the float weight behind it
    layer             running statistics of a BatchNorm layer, and the moments of what it normalises
    moments           count, mean and squared deviations of what a layer normalises
    watch             sees what the layers of a model normalise, while it runs
    visit             one forward of a layer, in one thread

integrations/: swafast in frameworks with a training loop of their own
    contract          what the ``WeightAverage`` of every framework has in common
    evaluation        a framework's run of a model on data, in which the model has averages
    model ema         an averaged model in timm's words
    saved averages    the averages among the states of torchtitan's checkpoints
    found states      loads what a checkpoint has of a state, and tells what it has

convert/: states of other packages' averages
    kind              what one package writes, and how it is recognised
    reading           what such a state tells
    conversion        what an average goes on with after it has loaded one

swafast/*.py: faces
    finder            Python's import finder, which explains that a module has moved

``numel`` counts elements, ``nbytes`` bytes, ``*_offset`` elements; all of them 64-bit.
"""
