"""The words that the code uses, and no others: each noun has one meaning. What is not here is torch's or Python's.

csrc/: kernels
    kernel            a C++, CUDA or Triton function that moves the elements of chunks
    chunk             a run that one CPU task, CUDA block or Triton program handles
    block             CUDA's block of threads
    blend             what the lerp of each element takes from a weight

torch_private/: names that are private in torch
    walk              a path through a module that finds all its tensors again quickly
    flat param        the 1-D tensor in which an FSDP1 module keeps its params
    flat shard        this rank's shard of one original param in a flat param

terms/: ints, names and numbers
    model             the module that is trained
    param             one of the model's live tensors
    buffer            a buffer of an ``nn.Module``, nothing else
    average           the running average of a param, which we own
    averaged model    the averages of one model, with their rule and their counter
    rule              how the weight follows from the number of updates
    weight            interpolation weight of the newest param, as in ``torch.lerp``
    decay             ``1 - weight`` of an exponential average
    terms             the numbers from which a kernel works out a rule's weight
    update            one call of ``update_parameters``
    step              a step of the optimizer, never ours
    num_averaged      how many models are in the average; the state-dict key is ``n_averaged``, as in torch
    counter           the int64 tensor on the device that holds ``num_averaged``
    format            how an average is stored
    plane             one of a format's tensors; plane 0 is the averaged module's own param
    remainder         the plane that holds the bits that plane 0 leaves out
    seed              the user's number that random bits follow from
    draws             where the random bits of one average come from
    random key        64 bits that stand for the seed and a param's name in its draws
    box               a rectangle of a tensor: one offset and one size for each dimension
    run               consecutive elements in memory
    order             a tensor's dimensions, the slowest in memory first
    extent            elements from the first to the last that a tensor touches in memory
    bucket            one flat allocation that holds planes of one device and dtype
    slot              where one plane lies in a bucket
    key               what something is looked up by: of a state, the name of an entry
    package           the public package under whose name a class is pickled

backends/: tensors in, tensors changed
    backend           ``reference``, ``cpu``, ``cuda`` or ``triton``
    unavailable       why a backend cannot run here
    pair              one param and its average
    pace              a rule and a counter: how far the averages of one averaged model move
    pace cache        the paces as a kernel takes them, made anew when one changes
    launch            pairs made ready for one backend, to be updated again and again
    row               one pair in the table that a kernel reads
    signature         the arguments and the result of one function of the native library
    follower          a row that averages the same param as the row before it
    table             the rows, chunks and state words of one launch on one GPU
    head              the C struct that points to the parts of a table
    words             the memory of a tensor as integers
    flag              one int64 that says whether any rank has found something
    window            as many elements or bytes as are worked on at a time
    tile              the elements that a Triton program moves at a time

loop/: averages that follow an optimizer
    attachable        what can be attached to an optimizer
    attachment        an averaged model that follows an optimizer's steps
    schedule          after which steps an attachment updates
    span              a time that the user gives: steps, epochs or a share of the training
    runner            how an attachment runs its updates: plain, on streams or in a thread
    plain             the runner that updates in the optimizer's hook
    on streams        the runner that updates on side streams of the GPUs
    in thread         the runner that updates in a thread
    ready             a function that gets an update ready and returns it
    stand-in          a copy of a model's tree of modules, for an update beside the next forward
    guard             lets one thread at a time use an averaged model, and none while it is swapped
    lock              what a guard holds; it is new in a forked child
    updating          what an attachment and its runner ask of an averaged model
    together          what a guard asks of the ranks that act together

op/: one update, planned and launched
    plan              the pairs of an update, their averages in buckets and the work made ready
    work              the pairs of a plan that one backend updates
    fingerprint       addresses, shapes and dtypes of tensors, to see whether a plan still fits
    plane like        what a plane is to be, before it is made
    home              the address of a plane in a bucket
    exchange          params and averages that change places, and back
    checksum          64 bits of a tensor; those of the boxes that it is cut into add up to it

average/: averaged models of one process
    side              one of the averaged models that are updated together
    owner             the module that holds a side's planes and counter
    binding           a plan, and the way to the tensors that it was made for; ``Bindings`` keeps the one in
                      use and those that a CUDA graph holds
    tree              planes under dotted names, as a module
    recast            a move or cast of an averaged model to another device or dtype

sharded/parts/: what one rank has, and what ranks tell each other
    ranks             the process group of our own that all averages of one user's group share
    subgroup          the ranks of one cut, where these are not all
    one process       ranks of a process without a process group
    number            of an averaged model among those that share their ranks
    fault             why no peer may be met any more
    lost peer error   the error that a fault raises
    rendezvous        turns in which ranks exchange messages through the store of the user's group
    turn              one exchange of a rendezvous
    seat              what one rank knows of our process group over one of the user's
    mesh              torch's ``DeviceMesh`` as plain ints and names
    sharding          how a tensor lies on the ranks: mesh and placements, replicated, or an FSDP1 flat param
    replica           a rank that holds the same elements as another one
    shard             this rank's part of a param that is sharded
    holding           what this rank holds of one param or buffer, in ints
    held              a holding with its tensor
    part              what one rank has of something cut
    share             the part of a holding that this rank averages
    cut               params that the same ranks hold alike, cut evenly over these ranks
    flat order        tensors one after the other, cut evenly into parts
    part tensor       a part in the form that ``torch.distributed.checkpoint`` takes
    spread            fills the params of one cut on all ranks with the parts of all ranks
    piece             what one rank sends in one window of a spread

sharded/: averages of models that lie on several ranks
    locator           finds the tensors of this rank's shares again
    views             the params of a plan, viewed when they are asked for
    bound             a plan with the params and planes that it fits now
    staging           copies of what a forward writes, for an update beside it
    swap              one use of ``swapped_into`` on several ranks
    entry             one plane or buffer in a state, under one key or under those of tied params
    seal              checksum and dtype of an entry, in the state
    pending load      what a state gives this rank, until it is verified and written

posthoc/: averages made after training
    snapshot          averages stored at one count; ``Snapshots`` is a folder of them
    sidecar           the file that says what a snapshot holds
    stored average    one average of one snapshot
    stored tensor     what a snapshot says of one param or buffer
    stored part       what this rank writes of one stored tensor
    wanted tensor     a tensor to be made from snapshots
    sum               a weighted sum of stored averages
    profile           the weights that the models of a training have in an average
    fit               the sum of stored averages that comes nearest to a wanted one

optim/: other packages' recipes
    swa               torchcontrib's optimizer of that name, and Composer's algorithm
    clock             after which steps the updates of Composer's SWA come
    cycles            a learning rate that repeats
    triangle          a rate that falls and rises linearly
    cosine            a rate that falls as a cosine, of which the last steps repeat
    layer             a BatchNorm layer and its moments
    moments           count, mean and squares of what comes into a layer

faces: swafast/*.py
    finder            Python's import finder, which says where a moved module went

``numel`` counts elements, ``nbytes`` bytes, ``*_offset`` elements; all of them 64-bit.
"""
