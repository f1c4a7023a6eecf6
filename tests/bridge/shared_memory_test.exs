defmodule Tinkex.CustomLoss.SharedMemoryTest do
  # Large payloads, through memory that a worker shares with the BEAM and through its pipe.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.Pool.{Memory, Outbox}
  alias Tinkex.CustomLoss.WorkerError

  @moduletag timeout: 120_000

  # 50,000 values a datum are 200 kB.
  @values 50_000

  defp floats(value, count \\ @values),
    do: {:binary.copy(<<value::float-little-32>>, count), [count]}

  defp random(count) do
    for(_ <- 1..count//1, into: <<>>, do: <<:rand.uniform()::float-little-32>>)
  end

  defp compute(pool, value, term, opts \\ []) do
    data = [%{loss_fn_inputs: %{"weights" => floats(value)}}]
    opts = Keyword.merge([regularizers: [Map.put(term, :weight, 1.0)]], opts)
    CustomLoss.compute(pool, data, [floats(value)], opts)
  end

  defp held_by(process) do
    {:binary, binaries} = Process.info(process, :binary)
    for({_address, size, _count} <- binaries, do: size) |> Enum.sum()
  end

  # What each shared file of a process has, in bytes, by its inode.
  defp shared_files(os_pid) do
    for path <- Path.wildcard("/proc/#{os_pid}/fd/*"),
        {:ok, "/memfd:tinker_custom_loss" <> _} <- [File.read_link(path)],
        {:ok, stat} <- [File.stat(path)],
        into: %{},
        do: {stat.inode, stat.size}
  end

  # Whoever has one of these files open or mapped.
  defp holders(inodes) do
    open =
      for path <- Path.wildcard("/proc/[0-9]*/fd/*"),
          {:ok, "/memfd:tinker_custom_loss" <> _} <- [File.read_link(path)],
          {:ok, %{inode: inode}} <- [File.stat(path)],
          inode in inodes,
          do: path

    mapped =
      for path <- Path.wildcard("/proc/[0-9]*/maps"),
          {:ok, maps} <- [File.read(path)],
          line <- String.split(maps, "\n"),
          line =~ "/memfd:tinker_custom_loss",
          line |> String.split() |> Enum.at(4) |> String.to_integer() |> Kernel.in(inodes),
          do: path

    open ++ mapped
  end

  describe "one computation" do
    setup do
      %{shared: start_pool!(name: __MODULE__.Shared, shared_memory: true, await_ready: true)}
    end

    test "has the same answer, to the last bit, either way", %{shared: shared} do
      piped = start_pool!(name: __MODULE__.Piped, shared_memory: false, await_ready: true)
      shapes = [[@values], [100, 20], [0], [@values]]
      tensor = fn shape -> {random(Enum.product(shape)), shape} end
      logprobs = Enum.map(shapes, tensor)

      data =
        for shape <- shapes do
          tokens = for _ <- 1..Enum.product(shape)//1, into: <<>>, do: <<5::64-little>>
          inputs = %{"weights" => tensor.(shape), "target_tokens" => {tokens, shape, :int64}}
          %{model_input: [1, 2, 3], loss_fn_inputs: inputs}
        end

      opts = [
        base_loss: :nll,
        regularizers: [
          %{name: "l2", fn: :l2, weight: 0.1},
          %{name: "l1", fn: :l1, weight: 0.2, run_in_executor: true}
        ]
      ]

      [one, other] =
        for pool <- [shared, piped] do
          {:ok, output} = CustomLoss.compute(pool, data, logprobs, opts)
          {output.loss_total, output.gradients, output.record["regularizers"]["l2"]["grad_norm"]}
        end

      assert one == other
      [os_pid] = os_pids(shared)
      assert shared_files(os_pid) |> Map.values() |> Enum.max() > 4 * @values
      [os_pid] = os_pids(piped)
      assert shared_files(os_pid) == %{}
    end

    test "that is small takes the pipe", %{shared: shared} do
      {:ok, _} = CustomLoss.compute(shared, nil, [[-1.0, -2.0]], base_loss: :l2)
      [os_pid] = os_pids(shared)
      assert shared_files(os_pid) |> Map.values() |> Enum.max() == 32
    end

    test "is its own among many at one time", %{shared: shared} do
      1..24
      |> Enum.map(fn n ->
        Task.async(fn ->
          for step <- 1..5 do
            value = -(n + step / 8)

            {:ok, output} =
              compute(shared, value, %{name: "l2", fn: :l2, params: %{reduction: "token_sum"}})

            {gradient, _shape} = hd(output.gradients)
            # Of Σ weight · x², with the value as the weight.
            assert gradient == elem(floats(2 * value * value), 0)
          end
        end)
      end)
      |> Task.await_many(60_000)
    end
  end

  test "memory that was not used lately is given back" do
    pool = start_pool!(shared_memory: true, await_ready: true, ping_interval: 100)
    {:ok, _} = compute(pool, -1.0, %{name: "l2", fn: :l2})
    [os_pid] = os_pids(pool)
    eventually(fn -> Enum.all?(shared_files(os_pid), fn {_inode, size} -> size <= 32 end) end)
    {:ok, %{gradients: [{gradient, _}]}} = compute(pool, -3.0, %{name: "l2", fn: :l2})
    assert gradient == elem(floats(18.0), 0)
  end

  describe "a number is what it was" do
    setup do
      %{pool: start_terms!(["keeps_what_it_is_given.py"], shared_memory: true, max_in_flight: 1)}
    end

    defp told(pool) do
      {:ok, output} = compute(pool, -5.0, %{name: "tells", fn: "keeps_what_it_is_given:tells"})
      output.record["regularizers"]["tells"]["custom"]["kept"]
    end

    test "where a term keeps what it was given", %{pool: pool} do
      {:ok, _} = compute(pool, -1.0, %{name: "keeps", fn: "keeps_what_it_is_given:keeps"})
      for value <- [-2.0, -3.0], do: {:ok, _} = compute(pool, value, %{name: "l2", fn: :l2})
      assert told(pool) == -2.0 * @values
    end

    test "where a term still runs when its request is over", %{pool: pool} do
      term = %{name: "outlives", fn: "keeps_what_it_is_given:outlives_its_request"}
      term = Map.merge(term, %{run_in_executor: true, timeout: 1_000})
      assert {:error, %CustomLoss.TermError{timed_out: true}} = compute(pool, -1.0, term)
      for value <- [-2.0, -3.0], do: {:ok, _} = compute(pool, value, %{name: "l2", fn: :l2})
      assert told(pool) == -1.0 * @values
    end

    test "where a process that a term forked writes to its copy", %{pool: pool} do
      term = %{name: "forks", fn: "keeps_what_it_is_given:forks_and_writes"}
      {:ok, output} = compute(pool, -1.0, term)
      assert output.record["regularizers"]["forks"]["custom"]["weights"] == -1.0 * @values
    end
  end

  describe "a worker" do
    test "that cannot share memory is an error where it has to" do
      opts = [python: fixture("behaves.py"), await_ready: true, shared_memory: true]
      Process.flag(:trap_exit, true)

      assert {:error, %WorkerError{reason: {:not_started, sentence}}} =
               CustomLoss.start_link(opts)

      assert sentence =~ "memfd_create"
      assert sentence =~ "shared_memory: :auto"
    end

    test "that offers files of another process gets the pipe, or is an error" do
      env = %{"TOKEN" => "fedcba9876543210"}
      opts = [python: fixture("misplaces_answers.py"), env: env, await_ready: true]
      Process.flag(:trap_exit, true)

      assert {:error, %WorkerError{reason: {:not_started, sentence}}} =
               CustomLoss.start_link([shared_memory: true] ++ opts)

      assert sentence =~ "is not the worker's"
    end

    @tag :tmp_dir
    test "that was killed before its files were opened is replaced", %{tmp_dir: dir} do
      env = %{"DIES_ONCE" => Path.join(dir, "died")}
      pool = start_peers!("dies_when_ready.py", shared_memory: true, env: env)
      assert {:ok, %{loss_total: 5.0}} = compute(pool, -1.0, %{name: "l2", fn: :l2}, step: 5)
    end

    test "whose files the writer cannot open is sent by the pipe what they would hold" do
      port = Port.open({:spawn_executable, "/bin/cat"}, [{:packet, 4}, :binary])
      ready = %{pid: System.pid(), shared_memory: %{descriptors: [999_999], token: "token"}}
      outbox = port |> Outbox.open() |> Outbox.share(ready)
      frame = [<<0xC6, 4 * @values::32>>, elem(floats(-1.0), 0), <<0x80>>]
      {placed, _memory} = Memory.place(%Memory{free: [0]}, 7, frame)
      assert {:shared, 0, _frame} = placed
      Outbox.put(outbox, 7, placed)
      assert_receive {^port, {:data, echoed}}, 10_000
      assert echoed == IO.iodata_to_binary(frame)
    end

    test "that says its answer is where it cannot be is replaced, with a sentence" do
      pool = start_peers!("misplaces_answers.py", shared_memory: true)

      ask = fn step ->
        CustomLoss.compute(pool, nil, [floats(-1.0)], base_loss: :l2, step: step)
      end

      assert {:ok, %{loss_total: 5.0}} = ask.(5)

      for {step, what} <- %{
            1 => ~r/bytes from \d+ on of a shared file of \d+/,
            2 => ~r/the shared file 1, which \d+ does not have/,
            3 => ~r/the shared file 9, which \d+ does not have/,
            4 => ~r/bytes from \d+ on of a shared file of \d+/
          } do
        assert {:error, %WorkerError{reason: {:lost, [{:protocol, sentence} | _]}}} = ask.(step)
        assert sentence =~ what
      end

      assert {:ok, %{loss_total: 5.0}} = ask.(5)
    end
  end

  describe "nothing is left" do
    test "of a large call in the BEAM's processes, before any ping" do
      pool = start_pool!(shared_memory: true, await_ready: true, ping_interval: 60_000)

      logprobs = [floats(-1.0, 500_000)]
      # What the caller has ends with it.
      call =
        Task.async(fn -> {:ok, _} = CustomLoss.compute(pool, nil, logprobs, base_loss: :l2) end)

      Task.await(call)

      eventually(fn -> Enum.all?(processes(pool), &(held_by(&1) < 100_000)) end)
    end

    test "of a worker that is killed, or ended by its pool" do
      name = __MODULE__.Killed
      pool = start_pool!(name: name, shared_memory: true, await_ready: true, backoff: {10, 200})
      {:ok, _} = compute(pool, -1.0, %{name: "l2", fn: :l2})
      [os_pid] = os_pids(pool)
      first = Map.keys(shared_files(os_pid))
      assert length(first) == 4
      assert holders(first) != []

      signal(os_pid, "KILL")
      eventually(fn -> holders(first) == [] end)
      await_all(pool)
      {:ok, _} = compute(pool, -1.0, %{name: "l2", fn: :l2})
      [os_pid] = os_pids(pool)
      second = Map.keys(shared_files(os_pid))

      stop_supervised!({CustomLoss, name})
      eventually(fn -> holders(second) == [] end)
    end

    test "when the BEAM is killed" do
      before = File.ls!("/dev/shm")
      peer = start_beam!()
      {:ok, python} = CustomLoss.Pool.Python.find(nil)
      opts = [python: python, shared_memory: true, await_ready: true]
      :peer.cast(peer, Tinkex.CustomLoss.Bridge, :keep_pool, [[name: Doomed] ++ opts, self()])
      eventually(fn -> :peer.call(peer, GenServer, :whereis, [Doomed]) != nil end, 30_000)
      args = [Doomed, nil, [floats(-1.0)], [base_loss: :l2]]
      {:ok, _} = :peer.call(peer, CustomLoss, :compute, args, 60_000)
      [os_pid] = :peer.call(peer, Tinkex.CustomLoss.Bridge, :os_pids, [Doomed])
      files = Map.keys(shared_files(os_pid))
      beam = :peer.call(peer, :os, :getpid, [])
      assert holders(files) |> Enum.any?(&String.starts_with?(&1, "/proc/#{beam}/fd/"))

      signal(beam, "KILL")
      eventually(fn -> holders(files) == [] end)
      assert Enum.filter(File.ls!("/dev/shm") -- before, &(&1 =~ "tinker")) == []
    end
  end
end
