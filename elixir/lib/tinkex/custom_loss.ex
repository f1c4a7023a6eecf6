defmodule Tinkex.CustomLoss do
  alias Tinkex.CustomLoss.Options

  @moduledoc """
  Custom losses for Tinker, written in Python and trained on from Elixir.

      loss_total = base_loss + Σ weight · regularizer

  PyTorch composes and differentiates them in a pool of Python processes, which the BEAM supervises.
  What comes back is the loss, its gradient with respect to every logprob, and a record of what each
  term did.

      children = [
        {Tinkex.CustomLoss, name: MyLoss, load: ["my_losses"], workers: 2}
      ]

      {:ok, output} =
        Tinkex.CustomLoss.compute(MyLoss, data, logprobs,
          base_loss: :nll,
          regularizers: [
            %{name: "stay close", fn: :kl, weight: 0.1, params: %{reference: "ref_logprobs"}},
            %{name: "topology", fn: "my_losses:topology", weight: 0.02}
          ]
        )

      output.loss_total
      output.record["regularizers"]["topology"]["contribution"]

  With a training client of Tinkex, `forward_backward_custom/4` is the whole step: forward, loss and
  gradient, backward.

  ## What is returned, what is raised

  What the caller got wrong, and can be told without a pool, raises `ArgumentError`. Everything else
  is `{:error, exception}`, where the exception says who is at fault:

    * `Tinkex.CustomLoss.TermError` - a term raised; it has Python's traceback
    * `Tinkex.CustomLoss.RequestError` - what was asked of the pool is not there, such as a term that
      it has not loaded, or Python refused the request
    * `Tinkex.CustomLoss.TimeoutError` - the deadline passed
    * `Tinkex.CustomLoss.OverloadedError` - too many requests wait already
    * `Tinkex.CustomLoss.WorkerError` - no worker could serve it

  ## What happens when

    * **the deadline passes**: the call returns at once. Python is told to cancel, and if it does not
      stop within the grace period, its process is killed and replaced.
    * **the caller dies**: the same, without a call to return.
    * **a term raises**: that call gets the error. Nothing else changes.
    * **a worker's process ends**, by a crash, the operating system, or because it was killed: another
      one is started after a pause. Requests that it had are tried once more, since a computation is
      pure, while others go on; one that ends a second worker is given up.
    * **the BEAM ends**, in any way: so do the Python processes and their children.

  Calls may come from any process. From another node, say `{MyLoss, node}`; deadlines and errors are
  the same.

  ## Options of a pool

  #{Options.start_docs()}
  """

  use Supervisor

  alias Tinkex.CustomLoss.{
    Merge,
    Output,
    Pool,
    Regularizer,
    Schema,
    Setup,
    Split,
    Telemetry,
    TimeoutError,
    Training,
    WorkerError
  }

  alias Tinkex.CustomLoss.Pool.{Call, Handle, Worker}
  alias Tinkex.CustomLoss.Training.LossFn
  alias Tinkex.CustomLoss.Wire.{Data, Tensor}

  @typedoc "The name of a pool, the pid that `start_link/1` returned, or `{name, node}`."
  @type server :: Supervisor.supervisor()

  @type error ::
          Tinkex.CustomLoss.TermError.t()
          | Tinkex.CustomLoss.RequestError.t()
          | Tinkex.CustomLoss.TimeoutError.t()
          | Tinkex.CustomLoss.OverloadedError.t()
          | WorkerError.t()

  @doc """
  Makes the Python environment that pools run in, and returns the path of its Python.

      python = Tinkex.CustomLoss.setup!(torch: :cpu)
      {:ok, _} = Tinkex.CustomLoss.start_link(name: MyLoss, python: python)

  The environment holds this package's Python side with PyTorch and the `tinker` SDK, and is made by
  `uv` where that is on PATH, by `venv` and `pip` where not. It takes minutes the first time, and no
  time once it is complete; one that is there is kept, and what it lacks is added. It works in a
  project, where `mix tinkex.custom_loss.setup` does the same, in a release, in a script and in
  Livebook.

  Raises `Tinkex.CustomLoss.SetupError` when it cannot be made, and then leaves nothing behind.

  ## Options

  #{Options.setup_docs()}
  """
  @spec setup!(keyword()) :: Path.t()
  def setup!(opts \\ []), do: opts |> Options.setup!() |> Setup.run()

  @doc """
  Starts a pool, linked to the caller. See the module's documentation for the options.

  Returns `{:error, exception}` only with `await_ready: true`, if no worker can be started. As with
  any `start_link`, a caller that does not trap exits then ends, too; under a supervisor, it says so.
  """
  @spec start_link(keyword()) :: Supervisor.on_start()
  def start_link(opts) do
    config = Options.start!(opts)
    name = if config.name, do: [name: config.name], else: []

    with {:error, {:shutdown, {:failed_to_start_child, :await_ready, error}}} <-
           Supervisor.start_link(__MODULE__, config, name),
         do: {:error, error}
  end

  @doc false
  def child_spec(opts) do
    # What else is wrong with them, start_link/1 says.
    name = if Keyword.keyword?(opts), do: opts[:name]
    opts |> super() |> Supervisor.child_spec(id: {__MODULE__, name})
  end

  @impl true
  def init(config) do
    Telemetry.load()
    # What events and log lines say: which pool it is.
    config = %{config | name: config.name || self()}
    Handle.forget_with(self())

    children = [
      {Pool, {self(), config}},
      %{
        id: :workers,
        type: :supervisor,
        start: {__MODULE__, :start_workers, [self(), config]}
      }
    ]

    # Temporary, so that it is forgotten once it has returned: a supervisor that starts its children
    # anew would wait in it again, and end if Python is not ready then.
    await = %{
      id: :await_ready,
      restart: :temporary,
      start: {__MODULE__, :await_ready, [self(), config]}
    }

    children = if config.await_ready, do: children ++ [await], else: children

    # Whoever loses the account of what workers have starts over with new ones.
    Supervisor.init(children, strategy: :rest_for_one)
  end

  @doc false
  def start_workers(supervisor, config) do
    pool = Handle.of(supervisor).pool
    workers = for index <- 1..config.workers, do: {Worker, {index, pool, config}}
    Supervisor.start_link(workers, strategy: :one_for_one)
  end

  @doc false
  def await_ready(supervisor, config) do
    # The worker's own clock starts later, and knows better what was the matter.
    timeout = config.start_timeout + 5_000

    case Pool.ask(Handle.of(supervisor).pool, :await_ready, timeout) do
      :ok -> :ignore
      :timeout -> {:error, %TimeoutError{timeout: timeout, stage: :queued}}
      {:error, error} -> {:error, error}
    end
  end

  @doc """
  The loss of `logprobs`, its gradient, and what each term did.

    * `data` - a list of datums, or nil: see `Tinkex.CustomLoss.Wire.Data`
    * `logprobs` - a list with one tensor a datum, `[T]` or `[T, K]`: lists of floats, Nx tensors,
      Tinkex's `TensorData` or raw outputs, or `{binary, shape}`. See `Tinkex.CustomLoss.Wire.Tensor`.

  ## Options

  #{Options.call_docs()}
  """
  @spec compute(server(), [Data.datum()] | nil, [Tensor.t()], keyword()) ::
          {:ok, Output.t()} | {:error, error()}
  def compute(server, data, logprobs, opts \\ []) do
    options = Options.call!(opts)

    with {:ok, output, _result} <- run(server, data, logprobs, options), do: {:ok, output}
  end

  @doc false
  # Beside the output, the result of Call.run/4. The gradients are in the form of the logprobs, or as
  # they came: one batch, which is what the linear loss takes.
  def run(server, data, logprobs, options, form \\ :given) do
    deadline = Call.deadline(options.timeout)
    batch = Tensor.logprobs(logprobs)

    request = %{
      logprobs: %{batch | forms: []},
      data: Data.to_wire(data, length(batch.shapes)),
      base_loss: options.base_loss,
      regularizers: Enum.map(options.regularizers, &Regularizer.to_wire/1),
      step: options.step,
      gradients: options.gradients,
      totals: options.totals
    }

    Telemetry.span(Call.name(server), request, fn ->
      with {:ok, result} <- Call.run(server, request, options.timeout, deadline),
           {:ok, gradients} <- restore(result.gradients, batch, form) do
        output = %Output{
          loss_total: result.loss_total,
          gradients: gradients,
          record: result.record
        }

        {:ok, output, result}
      else
        # From another node: as here, what MessagePack has no form for.
        {:error, %ArgumentError{} = error} -> raise error
        {:error, error} -> {:error, error}
      end
    end)
  end

  @doc """
  What each term divides by, for a step that is sent in several calls.

      loss = [base_loss: :ppo, regularizers: [%{fn: :kl, weight: 0.1, reduction: :token_mean}]]
      {:ok, totals} = Tinkex.CustomLoss.totals(MyLoss, data, loss)

      for part <- Enum.chunk_every(data, 8) do
        {:ok, task} =
          Tinkex.CustomLoss.forward_backward_custom(MyLoss, client, part, [totals: totals] ++ loss)

        Task.await(task, :infinity)
      end

  Any partition of the datums, in any order, has the gradient of one call with all of them. The
  totals are plain maps with string keys, by the names of the terms, and need no logprobs; those of
  parts add up with `add_totals/2`.

  A term of scope `group` needs its groups whole in every part. What looks at the whole batch, as
  every Python function of `(data, logprobs)` may, cannot be split: `forward_backward_custom/4`
  refuses such a part before it sends anything, with a `Tinkex.CustomLoss.RequestError`.

  `data` are all datums of the step, each with `target_tokens`. The options are `:base_loss`,
  `:regularizers` and `:timeout` of `compute/4`; a weight that is a function is not called.
  """
  @spec totals(server(), [Data.datum()], keyword()) :: {:ok, map()} | {:error, error()}
  def totals(server, data, opts), do: count(server, data, Options.totals!(opts))

  @doc false
  # With totals among the options: whether the datums are a part of such a step.
  def count(server, data, options) do
    unless data != [] and Schema.proper?(data) do
      raise ArgumentError, "expected data to be a list of datums, got: #{inspect(data)}"
    end

    request = %{
      data: Data.to_wire(data, length(data)),
      base_loss: options.base_loss,
      regularizers: Enum.map(options.regularizers, &Regularizer.to_wire/1),
      totals: options[:totals]
    }

    with {:error, %ArgumentError{} = error} <-
           Call.totals(server, request, options.timeout, Call.deadline(options.timeout)),
         do: raise(error)
  end

  @doc """
  The totals of a step from those of two parts of it, with the same terms.

  The same group index in both is one group. Raises `ArgumentError` where they are of different terms.
  """
  @spec add_totals(map(), map()) :: map()
  defdelegate add_totals(first, second), to: Split

  @doc """
  The record of a step that was computed in parts, from the outputs of its parts or their records.

      record = Tinkex.CustomLoss.merge(outputs)
      record["regularizers"]["kl"]["value"]

  For parts that were computed with the step's `:totals`: then it is the record of the one call that
  computes them together. Values, contributions and metrics add up, and so do counts and seconds. The
  parts' logprobs are disjoint, so squared norms and dot products add up too, from which norms and
  cosines follow. nil is what cannot be known: the value of a term that was skipped in a part, the
  cosine to a gradient that is not finite, and the step of a schedule where the parts differ in it.

  A record may also be the metrics of a step of `forward_backward_custom/4`, unless they are flat; what
  else is among them is left out. Raises `ArgumentError` where there are none, or where they are not
  of one step: other terms, or other weights.
  """
  @spec merge([Output.t() | %{String.t() => term()}]) :: %{String.t() => term()}
  defdelegate merge(parts), to: Merge

  defp restore(nil, _batch, _form), do: {:ok, nil}

  defp restore(gradients, batch, form) do
    with {:error, sentence} <- formed(gradients, batch, form),
         do: {:error, %WorkerError{reason: {:protocol, sentence}}}
  end

  defp formed(gradients, batch, :given), do: Tensor.restore(gradients, batch)

  defp formed(gradients, batch, :batch),
    do: with(:ok <- Tensor.check_gradients(gradients, batch), do: {:ok, gradients})

  @doc """
  One training step's forward and backward pass, with the custom loss between them.

  `training_client` is a Tinkex training client, or `{module, ref}` whose module has `forward/4` and
  `forward_backward/4` as `Tinkex.TrainingClient` has them: `(ref, data, loss_fn, opts)`, returning
  `{:ok, task}`.

  Returns `{:ok, task}`. The task, which belongs to the caller, comes to `{:ok, output}`: the training
  client's own `ForwardBackwardOutput`, whose `metrics` also hold

    * `"loss:sum"` - the custom loss, and `"surrogate_loss:sum"`, what the server computed
    * the record of the step: nested as in `Tinkex.CustomLoss.Output`, or flat

  or to `{:error, exception}`, the training client's error as it is. Nothing is sent backward
  unless the loss and its gradient are there and finite; nothing is reserved, so that a step that
  failed costs that step alone. Await the task before the next call to the training client: Tinkex
  does not keep the order of calls that overtake each other.

  ## Options

  Those of `compute/4`, without `:gradients`, and

  #{Options.train_docs()}
  """
  @spec forward_backward_custom(server(), term(), [Data.datum()], keyword()) :: {:ok, Task.t()}
  def forward_backward_custom(server, training_client, data, opts \\ []),
    do: Training.forward_backward_custom(server, training_client, data, Options.train!(opts))

  @doc """
  A loss of the server's own, and regularizers added to its gradient.

      {:ok, task} =
        Tinkex.CustomLoss.forward_backward(MyLoss, client, data, :ppo,
          regularizers: [%{name: "entropy", fn: :entropy, weight: 0.01}],
          client_opts: [loss_fn_config: %{"clip_low_threshold" => 0.8}]
        )

  The call to `training_client` goes out as it is, so the loss stays the server's, also one that no
  client can express. The regularizers are computed from the logprobs that it returns, without a
  forward pass of their own, and one linear `forward_backward` adds their gradient, or none where it
  is zero. Arrays that only terms read, such as `mask` or `reference_logprobs`, stay here, where
  `loss_fn` is one of `:cross_entropy`, `:importance_sampling`, `:ppo`, `:cispo` and `:dro`.

  Returns `{:ok, task}`. The task, which belongs to the caller, comes to `{:ok, output}`: that of the
  server's own loss, its metrics where they were, with the record of the step beside them and
  `"surrogate_loss:sum"`, what the linear pass came to. In the record the server's loss is the base
  loss. Its gradient with respect to the logprobs is not known here, nor what depends on it: the
  total norm and the cosines to the total are nil.

  Or it comes to `{:error, exception}`, the training client's error as it is. If a term failed, or the
  linear pass, the server's own loss is accumulated nevertheless, and the next `optim_step` trains on
  it. Await the task before the next call to the training client.

  ## Options

  Those of `forward_backward_custom/4`, without `:base_loss`, and at least one regularizer;
  `:loss_fn_config` among the `:client_opts` is for the server's own loss.
  """
  @spec forward_backward(server(), term(), [Data.datum()], atom() | String.t(), keyword()) ::
          {:ok, Task.t()}
  def forward_backward(server, training_client, data, loss_fn, opts),
    do: Training.forward_backward(server, training_client, data, loss_fn, Options.native!(opts))

  @doc """
  A loss function for Tinkex's own `forward_backward_custom/4`: its third argument.

      loss_fn = Tinkex.CustomLoss.loss_fn(MyLoss, base_loss: :nll, regularizers: regularizers)
      {:ok, task} = Tinkex.TrainingClient.forward_backward_custom(client, data, loss_fn)
      {:ok, output} = Task.await(task, :infinity)

  It takes the datums and a list of Nx tensors, one a datum, and returns `{loss, metrics}`. Tinkex
  calls it once with tensors and once under `Nx.Defn.grad`; the bridge is asked once, and its
  gradient is what grad comes to. `output.metrics` are then those of
  `forward_backward_custom/4`, but without `"surrogate_loss:sum"`.

  Where the loss fails, the task comes to `{:error, %Tinkex.Error{}}` with the exception in
  `data.exception`. The server was then sent a backward pass with a gradient of zero, since Tinkex
  has reserved a number for it that the server waits for; a raised error would leave the training
  client stuck for good. A part of a step that its `:totals` do not allow ends so, too, while
  `forward_backward_custom/4` refuses it before anything is sent.

  ## Options

  Those of `forward_backward_custom/4`; `:client_opts` are Tinkex's fourth argument instead. Raises
  `ArgumentError` where one is not valid, and where Nx is not there.
  """
  @spec loss_fn(server(), keyword()) :: ([Data.datum()], [Tensor.t()] -> {Tensor.t(), map()})
  def loss_fn(server, opts \\ []), do: LossFn.new(server, Options.loss_fn!(opts))

  @doc """
  What may be named in `:fn`: built-in terms and those of the modules in `:load`.

  Each is a map with `:name`, `:kind` (`"builtin"`, `"loaded"`), `:async`, `:doc` and `:params`, a
  list of maps with `:name`, `:required`, `:default` and `:type`. Waits for the first worker.
  """
  @spec terms(server(), timeout()) :: {:ok, [map()]} | {:error, error()}
  def terms(server, timeout \\ 30_000) do
    timeout = Options.timeout!(timeout, "terms/2")
    Call.terms(server, timeout, Call.deadline(timeout))
  end

  @doc """
  Takes no more requests, and returns `:ok` once all that were accepted are answered.

  For the end of a deployment, before the pool is stopped. Calls from then on return
  `Tinkex.CustomLoss.WorkerError` with the reason `:draining`, for good. `{:error, TimeoutError}` after
  `timeout` milliseconds; the pool then still drains.
  """
  @spec drain(server(), timeout()) :: :ok | {:error, error()}
  def drain(server, timeout \\ 30_000), do: manage(server, :drain, timeout)

  @doc """
  Starts the workers anew, one after another, without a lost call: for terms that were edited.

  Each worker first finishes what it has, while the others serve, or calls wait if there are none.
  Returns `:ok` when all are ready again, or the error with which the first one did not start, say
  because an edited module does not import: the others are then left as they are.
  `{:error, TimeoutError}` after `timeout` milliseconds; the pool goes on.
  """
  @spec reload(server(), timeout()) :: :ok | {:error, error()}
  def reload(server, timeout \\ 300_000), do: manage(server, :reload, timeout)

  defp manage(server, what, timeout) do
    timeout = Options.timeout!(timeout, "#{what}/2")
    Call.manage(server, what, timeout, Call.deadline(timeout))
  end

  @doc """
  What the pool is doing.

      %{
        workers: [
          %{
            index: 1, state: :ready, os_pid: 4242, in_flight: 1, restarts: 0, since_ms: 81_200,
            reason: nil, rss: 412_000_000, versions: %{torch: "2.13.0", ...}
          }
        ],
        in_flight: 1, queued: 0, uptime_ms: 90_500, max_in_flight: 4, max_queue: 100
      }

  `uptime_ms` is that of the pool. A worker's `state` is `:starting`, `:ready` or `:down`, since
  `since_ms` milliseconds. `reason` is why the one before it ended, as in `Tinkex.CustomLoss.WorkerError`; `rss` its resident memory in
  bytes, at the last ping.
  """
  @spec info(server()) :: {:ok, map()} | {:error, error()}
  def info(server), do: Call.info(server, 5_000, Call.deadline(5_000))
end
