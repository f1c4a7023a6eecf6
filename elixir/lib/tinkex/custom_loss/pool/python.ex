defmodule Tinkex.CustomLoss.Pool.Python do
  @moduledoc false
  # Which Python, what it is told, and why it did not start.

  alias Tinkex.CustomLoss.{Environment, Setup, WorkerError}
  alias Tinkex.CustomLoss.Pool.Memory

  @module "tinker_custom_loss.port"

  # Asks torch to ask Linux for pages of 2 MB: to be given small ones took up to two thirds of a call.
  @large_pages {"THP_MEM_ALLOC_ENABLE", "1"}

  @doc """
  Starts the operating system's process of a worker, or of what `args` say. The calling process owns
  the port.

  There is no shell in between, so that the process is the one that signals reach. The BEAM makes
  each such process the leader of its own process group, whose number is its pid.
  """
  @spec open(map(), [String.t()]) ::
          {:ok, port(), os_pid :: pos_integer() | nil} | {:error, WorkerError.t()}
  def open(config, args) do
    with {:ok, python} <- find(config.python) do
      options = [
        {:packet, 4},
        # File descriptors 3 and 4: nothing that is printed can reach the stream.
        :nouse_stdio,
        :binary,
        :exit_status,
        :hide,
        args: ["-u", "-m" | args],
        env: env(config)
      ]

      options = if config.cd, do: [{:cd, config.cd} | options], else: options
      port = Port.open({:spawn_executable, python}, options)

      {:ok, port, with({:os_pid, os_pid} <- Port.info(port, :os_pid), do: os_pid)}
    end
  rescue
    # What the operating system refuses: eacces, enomem, emfile and the like.
    error in ErlangError ->
      with %ErlangError{original: reason} <- error do
        not_started(
          "#{config.python || "Python"} cannot be started: #{inspect(reason)}; " <>
            "mix tinkex.custom_loss.doctor says which Python is meant"
        )
      else
        _defect -> reraise error, __STACKTRACE__
      end
  end

  @doc "The Python of the documented order, as an absolute path."
  @spec find(String.t() | nil) :: {:ok, Path.t()} | {:error, WorkerError.t()}
  def find(given), do: with({:ok, python, _source} <- choose(given), do: {:ok, python})

  @doc "The same, with what named it."
  @spec choose(String.t() | nil) :: {:ok, Path.t(), String.t()} | {:error, WorkerError.t()}
  def choose(given) do
    {source, name} =
      cond do
        given -> {"the option :python", given}
        python = env_var("TINKEX_CUSTOM_LOSS_PYTHON") -> {"TINKEX_CUSTOM_LOSS_PYTHON", python}
        python = in_release() -> {"the release", python}
        dir = env_var("VIRTUAL_ENV") -> {"VIRTUAL_ENV", Path.join(dir, "bin/python")}
        File.exists?(".venv/bin/python") -> {"the directory .venv", ".venv/bin/python"}
        true -> {"PATH", "python3"}
      end

    path = if name =~ "/", do: Path.expand(name), else: System.find_executable(name)

    cond do
      path && Setup.unfinished?(path) ->
        not_started(
          "the environment of #{path} is not finished: wait if mix tinkex.custom_loss.setup runs, " <>
            "and else run it"
        )

      path && File.regular?(path) ->
        {:ok, path, source}

      source == "PATH" ->
        not_started(
          "there is no python3 on PATH: install Python 3.11 or newer, or say where it is with " <>
            "the option :python or the environment variable TINKEX_CUSTOM_LOSS_PYTHON"
        )

      true ->
        not_started("there is no Python at #{name}, which #{source} names: correct or remove it")
    end
  end

  # What Tinkex.CustomLoss.Release put there.
  defp in_release do
    with root when is_binary(root) <- env_var("RELEASE_ROOT"),
         python = Path.join(root, "python/bin/python"),
         true <- File.exists?(python) do
      python
    else
      _none -> nil
    end
  end

  defp env_var(name), do: with("" <- System.get_env(name, ""), do: nil)

  @doc "What a worker is told."
  @spec worker_args(map()) :: [String.t()]
  def worker_args(config) do
    [@module | Enum.flat_map(config.load, &["--load", &1])] ++
      ~w(--max-frame #{config.max_frame} --max-in-flight #{config.max_in_flight}) ++
      ~w(--threads #{config.threads} --log-level #{config.log_level}) ++
      ~w(--shared-memory #{Memory.files(config)}) ++
      record_args(config.record)
  end

  defp record_args(nil), do: []

  defp record_args(record) do
    ["--record", record.dir, "--keep", record.keep, "--keep-bytes", "#{record.keep_bytes}"]
  end

  defp env(config) do
    given = Environment.variables(config.env)

    {_, inherited} =
      List.keyfind(given, "PYTHONPATH", 0, {:inherited, System.get_env("PYTHONPATH")})

    path = Enum.map(config.python_path, &Path.expand/1) ++ List.wrap(sources())
    path = path ++ if(inherited in [nil, ""], do: [], else: [inherited])

    variables = List.keystore(given, "PYTHONPATH", 0, {"PYTHONPATH", Enum.join(path, ":")})
    variables = if large_pages_chosen?(given), do: variables, else: [@large_pages | variables]
    for {name, value} <- variables, do: {native(name), value != nil and native(value)}
  end

  defp large_pages_chosen?(given) do
    {name, _value} = @large_pages
    List.keymember?(given, name, 0) or System.get_env(name) != nil
  end

  # Where the locale is not UTF-8, as in a container without LANG, a port takes bytes alone.
  defp native(text) do
    chars = to_charlist(text)

    if :file.native_name_encoding() == :latin1 and Enum.any?(chars, &(&1 > 0xFF)),
      do: :binary.bin_to_list(text),
      else: chars
  end

  @doc """
  The directory of the Python sources that came with this application.

  nil where it was built without them: then Python has to have the package installed.
  """
  @spec sources() :: Path.t() | nil
  def sources do
    with dir when is_list(dir) <- :code.priv_dir(:tinkex_custom_loss),
         path = Path.join(dir, "python"),
         true <- File.dir?(Path.join(path, "tinker_custom_loss")) do
      path
    else
      _ -> nil
    end
  end

  # Prints the packages that are missing; the version first, since an old Python cannot say more.
  @probe """
  import sys
  if sys.version_info < (3, 11):
      print("version", sys.version.split()[0])
  else:
      from importlib.util import find_spec
      names = "tinker_custom_loss cloudpickle msgspec numpy rich tinker torch".split()
      missing = [name for name in names if find_spec(name) is None]
      print("missing" if missing else "complete", *missing)
  """

  @doc "Why a Python that exited before it was ready did so, and what to run."
  @spec diagnose(map(), non_neg_integer()) :: {:error, WorkerError.t()}
  def diagnose(config, status) do
    with {:ok, python} <- find(config.python),
         :ok <- check(python, config) do
      not_started(
        "#{python} exited with status #{status} before it was ready; what it said is on the " <>
          "standard error of the BEAM. To see it again, run: #{doctor(python, config)}"
      )
    end
  end

  # Python's own doctor imports all that a worker does, in this environment but for what :env sets,
  # which may be secret.
  defp doctor(python, config) do
    {_, path} = List.keyfind(env(config), ~c"PYTHONPATH", 0)
    load = Enum.flat_map(config.load, &["--load", quoted(&1)])
    command = [quoted(python), "-m", "tinker_custom_loss", "doctor" | load]
    command = Enum.join(["PYTHONPATH=#{quoted(to_string(path))}" | command], " ")
    if config.cd, do: "cd #{quoted(config.cd)} && #{command}", else: command
  end

  # For a shell.
  defp quoted(text) do
    if text =~ ~r{\A[\w./:@%+,=-]+\z}u,
      do: text,
      else: "'" <> String.replace(text, "'", "'\\''") <> "'"
  end

  @doc """
  Whether a Python is new enough and has the packages, without importing them.

  It has the `:start_timeout` of a worker for that.
  """
  @spec check(Path.t(), map()) :: :ok | {:error, WorkerError.t()}
  def check(python, config) do
    case probe(python, config) do
      :timeout ->
        not_started(
          "#{python} was asked what packages it has, did not end within " <>
            "#{config.start_timeout / 1000} s, and was killed: see what keeps it, with: #{python} -v -c pass"
        )

      {"version " <> version, 0} ->
        not_started("#{python} is Python #{String.trim(version)}: 3.11 or newer is needed")

      {"missing " <> names, 0} ->
        lacking(python, names |> String.replace("_", "-") |> String.split())

      _nothing_missing ->
        :ok
    end
  end

  defp probe(python, config) do
    options = [:binary, :exit_status, :stderr_to_stdout, :hide]
    options = [{:args, ["-c", @probe]}, {:env, env(config)} | options]
    port = Port.open({:spawn_executable, python}, options)
    timer = Process.send_after(self(), {port, :timeout}, config.start_timeout)
    answer = collect(port, "")
    Process.cancel_timer(timer)
    answer
  end

  defp collect(port, said) do
    receive do
      {^port, {:data, more}} ->
        collect(port, said <> more)

      {^port, {:exit_status, status}} ->
        {said, status}

      {^port, :timeout} ->
        with {:os_pid, os_pid} <- Port.info(port, :os_pid),
             do: System.cmd("/bin/sh", ["-c", "kill -KILL -#{os_pid}"])

        Port.close(port)
        :timeout
    end
  end

  @doc "`System.cmd/3` in the environment that workers have."
  def cmd(python, args, config, opts \\ []) do
    env = for {name, value} <- env(config), do: {"#{name}", (value && "#{value}") || nil}
    System.cmd(python, args, [env: env] ++ opts)
  end

  defp lacking(python, names) do
    not_started(
      "#{python} lacks #{Enum.join(names, ", ")}; run: mix tinkex.custom_loss.setup, which makes " <>
        "an environment that has it all, or: #{python} -m pip install #{Enum.join(names, " ")}"
    )
  end

  @doc false
  def not_started(sentence), do: {:error, %WorkerError{reason: {:not_started, sentence}}}
end
