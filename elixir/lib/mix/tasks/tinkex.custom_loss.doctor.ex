defmodule Mix.Tasks.Tinkex.CustomLoss.Doctor do
  @shortdoc "Checks that Tinkex.CustomLoss can work here"

  @moduledoc """
  Checks what `Tinkex.CustomLoss` needs, one line each, and says what to do about what is missing.

      mix tinkex.custom_loss.doctor
      mix tinkex.custom_loss.doctor --load my_losses --python path/to/python

  Checked are Elixir; which Python is used and why; its version; its packages and their versions; the
  modules in `--load`; a gradient; and a request through a real worker. What builds on a failed check
  is not tried. The task's exit status is 1 if anything failed.

  ## Options

    * `--python` - as the option `:python` of a pool
    * `--load` - as an entry of the option `:load` of a pool. Repeatable
  """

  use Mix.Task

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.Options
  alias Tinkex.CustomLoss.Pool.Python

  @requirements ["app.config"]
  @switches [python: :string, load: :keep]

  @impl true
  def run(args) do
    config = args |> options!(@switches, __MODULE__) |> pool_options() |> Options.start!()
    ok("Elixir #{System.version()} on OTP #{System.otp_release()}")

    with {:ok, python, source} <- Python.choose(config.python),
         ok("#{source} names #{python}"),
         :ok <- Python.check(python, config) do
      python!(python, "doctor", config)
      round_trip(config)
    else
      {:error, error} -> fail(Exception.message(error))
    end
  end

  @doc false
  # Shared with the other tasks.
  def options!(args, switches, task) do
    case parse!(args, switches, task) do
      {opts, []} -> opts
      {_opts, [word | _]} -> Mix.raise("#{word}: expected options")
    end
  end

  @doc false
  def parse!(args, switches, task) do
    case OptionParser.parse(args, strict: switches) do
      {opts, words, []} -> {opts, words}
      {_, _, [{option, _} | _]} -> Mix.raise(wrong(option, switches, task))
    end
  end

  # All our options take any text, so that a known one is wrong only without it.
  defp wrong(option, switches, task) do
    known = for {name, _} <- switches, do: "--" <> String.replace("#{name}", "_", "-")
    what = if option in known, do: "a value is missing", else: "there is no such option"
    "#{option}: #{what}; to read of the options: mix help #{Mix.Task.task_name(task)}"
  end

  @doc false
  def pool_options(opts),
    do: Keyword.take(opts, [:python]) ++ [load: Keyword.get_values(opts, :load)]

  @doc false
  # A command of the Python package, whose output is ours, and whose failure ends the task.
  def python!(python, command, config, args \\ []) do
    args = Enum.flat_map(config.load, &["--load", &1]) ++ args
    args = ["-m", "tinker_custom_loss", command | args]
    {_, status} = Python.cmd(python, args, config, into: IO.stream(:stdio, :line))
    if status != 0, do: exit({:shutdown, 1})
    :ok
  end

  defp round_trip(config) do
    {:ok, _} = Application.ensure_all_started(:logger)
    # Where it is there, it warns of every event until it is started. The task starts no other
    # application of the project.
    if match?({:module, _}, Code.ensure_loaded(:telemetry)),
      do: {:ok, _} = Application.ensure_all_started(:telemetry)

    # A pool that does not start is what this is to tell, not to end of.
    Process.flag(:trap_exit, true)
    opts = [load: config.load, await_ready: true, name: __MODULE__]
    opts = if config.python, do: [python: config.python] ++ opts, else: opts

    base_loss = %{fn: :l2, params: %{weights: nil}}

    with {:ok, pool} <- CustomLoss.start_link(opts),
         {:ok, output} <- CustomLoss.compute(pool, nil, [[-0.5, -1.5]], base_loss: base_loss) do
      Supervisor.stop(pool)

      if output.gradients == [[-1.0, -3.0]],
        do: ok("a worker answers through its port"),
        else: fail("the gradient of l2 is wrong: #{inspect(output.gradients)}")
    else
      {:error, error} -> fail(Exception.message(error))
    end
  end

  # The same columns as those of the Python package.
  defp ok(what), do: Mix.shell().info("ok    " <> what)

  defp fail(what) do
    Mix.shell().info("FAIL  " <> what)
    exit({:shutdown, 1})
  end
end
