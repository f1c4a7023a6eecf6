defmodule Tinkex.CustomLoss.OptionsTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.Options

  defp message(fun), do: Exception.message(assert_raise(ArgumentError, fun))

  describe "a pool" do
    test "has defaults for everything" do
      assert %{name: nil, workers: 1, threads: 1, max_in_flight: 4, await_ready: false} =
               Options.start!([])
    end

    for {option, value, expected} <- [
          {:workers, 0, "a positive integer"},
          {:workers, 1.5, "a positive integer"},
          {:max_queue, -1, "an integer that is not negative"},
          {:max_frame, 10, "an integer from 1048576 to 4294967295"},
          {:python, "", "a path or the name of a program"},
          {:python, "a\0b", "a path or the name of a program"},
          {:load, "my_losses", "a list of strings"},
          {:load, [:my_losses], "a list of strings"},
          {:name, "MyLoss", "an atom, {:global, term} or {:via, module, term}"},
          {:name, nil, "an atom, {:global, term} or {:via, module, term}"},
          # What no process can be given is refused before there is a supervisor to take down.
          {:python_path, [<<255>>], "a list of strings"},
          {:start_timeout, 5_000_000_000, "an integer from 1 to 2147483647"},
          {:cd, "/no/such/directory", "a directory that exists"},
          {:await_ready, :yes, "true or false"},
          {:backoff, {10, 5}, "{first, longest} in milliseconds"},
          {:log_level, :loud, "one of :debug, :info, :warning, :error, :critical"}
        ] do
      test "refuses #{inspect(value)} for :#{option}" do
        sentence =
          message(fn ->
            CustomLoss.start_link([{unquote(option), unquote(Macro.escape(value))}])
          end)

        assert sentence =~
                 "invalid value for :#{unquote(option)} of Tinkex.CustomLoss: expected #{unquote(expected)}"

        assert sentence =~ ", got: #{inspect(unquote(Macro.escape(value)))}"
      end
    end

    for {env, names} <- [
          {[{"A=B", "secret"}], ~s(["A=B"])},
          {%{A: "secret"}, "[:A]"},
          {%{"A" => <<"secret", 255>>}, ~s(["A"])}
        ] do
      test "refuses #{inspect(env)} for :env, and shows names alone" do
        sentence = message(fn -> CustomLoss.start_link(env: unquote(Macro.escape(env))) end)

        assert sentence =~
                 "invalid value for :env of Tinkex.CustomLoss: expected a map or list of"

        assert String.ends_with?(sentence, "got: #{unquote(names)}")
        refute sentence =~ "secret"
      end
    end

    test "names the options that there are" do
      sentence = message(fn -> CustomLoss.start_link(worker: 2) end)

      assert sentence =~
               "Tinkex.CustomLoss has no option :worker; its options are [:name, :python,"
    end

    test "documents every option" do
      for option <- Map.keys(Options.start!([])),
          do: assert(Options.start_docs() =~ "  * `:#{option}` - ")
    end

    test "is told apart from others by its name under a supervisor" do
      assert %{id: {CustomLoss, One}, type: :supervisor} = CustomLoss.child_spec(name: One)
    end
  end

  # None of these need a pool: they are refused before one is looked for.
  describe "a call" do
    defp compute(opts), do: CustomLoss.compute(NoSuchPool, nil, [[-1.0]], opts)

    test "needs something to compute" do
      assert message(fn -> compute([]) end) =~ "there is nothing to compute: give :base_loss"
    end

    test "refuses what is no timeout" do
      assert message(fn -> compute(base_loss: :nll, timeout: 0) end) =~
               "expected a positive number of milliseconds or :infinity, got: 0"

      # No receive waits longer; the request would have been with its worker when that shows.
      assert message(fn -> compute(base_loss: :nll, timeout: :timer.hours(24 * 365)) end) =~
               "expected at most 4294967295 milliseconds, or :infinity, got: 31536000000"

      for timeout <- [:soon, 0, 5_000_000_000] do
        assert message(fn -> CustomLoss.terms(NoSuchPool, timeout) end) =~
                 "invalid value for the timeout of Tinkex.CustomLoss.terms/2: expected"
      end
    end

    test "refuses what names no pool" do
      for server <- ["MyLoss", 1, {:a, :b, :c}, {MyLoss, "node"}, nil],
          call <- [&CustomLoss.info/1, &CustomLoss.terms/1] do
        assert message(fn -> call.(server) end) =~
                 "expected the name of a pool, its pid or {name, node}, got: #{inspect(server)}"
      end
    end

    test "refuses a base loss that cannot be named" do
      for fun <- [5, fn -> 1 end, true],
          do: assert(message(fn -> compute(base_loss: fun) end) =~ "base")

      assert message(fn -> compute(base_loss: {:nll, 5}) end) =~
               "invalid value for :params of the base loss: expected a map or keyword list, got: 5"

      assert message(fn -> compute(base_loss: %{fn: :nll, weight: 1}) end) =~
               "the base loss has no option :weight"
    end

    test "takes a base loss in each of its forms" do
      for base <- [:nll, "nll", [fn: :nll], %{"fn" => "nll"}],
          do: assert(%{base_loss: %{fn: "nll", params: %{}}} = Options.call!(base_loss: base))

      for base <- [
            {:nll, %{a: 1}},
            {:nll, a: 1},
            %{fn: :nll, params: %{a: 1}},
            [fn: :nll, params: [a: 1]],
            %{"fn" => "nll", "params" => %{a: 1}}
          ],
          do: assert(%{base_loss: %{fn: "nll", params: %{a: 1}}} = Options.call!(base_loss: base))

      assert message(fn -> compute(base_loss: [params: [a: 1]]) end) =~
               "the base loss lacks :fn; it needs :fn"
    end

    test "takes a reduction of the base loss" do
      for base <- [
            %{fn: "ppo", reduction: :token_mean},
            [fn: :ppo, reduction: "token_mean"],
            %{"fn" => "ppo", "reduction" => "token_mean"}
          ],
          do: assert(%{base_loss: %{reduction: "token_mean"}} = Options.call!(base_loss: base))

      assert message(fn -> compute(base_loss: %{fn: :ppo, reduction: :token_means}) end) =~
               ~r/:reduction of the base loss: expected one of :token_mean, .*, got: :token_means/
    end

    test "takes parameters that are atoms, but for those that are values" do
      params = %{reduction: :mean, x: nil, y: true, z: :nan, keys: [:a, %{b: :c}]}

      assert %{base_loss: %{params: params}} = Options.call!(base_loss: {:nll, params})

      assert params == %{
               reduction: "mean",
               x: nil,
               y: true,
               z: :nan,
               keys: ["a", %{b: "c"}]
             }
    end

    test "takes a weight that is a function of the step, which it calls here and now" do
      me = self()
      weight = fn step -> send(me, {:step, step, self()}) && step / 10 end
      regularizers = [%{name: "kl", fn: :kl, weight: weight}]

      for options <- [&Options.call!/1, &Options.train!/1, &Options.loss_fn!/1, &Options.check!/1] do
        assert %{regularizers: [%{weight: 0.3}]} = options.(step: 3, regularizers: regularizers)
        assert_received {:step, 3, ^me}
      end

      assert message(fn -> compute(regularizers: regularizers) end) ==
               ~s(the weight of regularizer "kl" is a function of the step: say which step it is, ) <>
                 "with :step"
    end

    test "refuses a weight's function that gives no number" do
      for given <- [:infinity, nil, "0.1"] do
        regularizer = %{name: "kl", fn: :kl, weight: fn _step -> given end}

        assert message(fn -> compute(step: 0, regularizers: [regularizer]) end) ==
                 ~s(the weight of regularizer "kl" at step 0 is #{inspect(given)}; ) <>
                   "expected the function to give a finite number"
      end

      assert message(fn ->
               compute(step: 0, regularizers: [%{name: "kl", fn: :kl, weight: fn -> 1 end}])
             end) =~ "expected a finite number, or a function of the step, got: #Function<"
    end

    test "refuses an option that is given twice" do
      assert message(fn -> compute(base_loss: :nll, step: 1, step: 2) end) ==
               "Tinkex.CustomLoss.compute/4 was given :step twice"

      regularizer = %{:weight => 1, "weight" => 2, :name => "kl", :fn => :kl}

      assert message(fn -> compute(regularizers: [regularizer]) end) ==
               ~s(regularizer "kl" was given :weight twice)
    end

    for {where, call} <- [
          {"takes a keyword list of options",
           quote(
             do: fn bad -> CustomLoss.compute(P, nil, [[-1.0]], [{:base_loss, :nll} | bad]) end
           )},
          {"expected :regularizers to be a list",
           quote(
             do: fn bad -> compute(regularizers: [[name: "kl", fn: :kl, weight: 1] | bad]) end
           )},
          {"expected a regularizer to be a map or keyword list",
           quote(do: fn bad -> compute(regularizers: [[{:name, "kl"} | bad]]) end)},
          {"logprobs[1] is the end of an improper list",
           quote(do: fn bad -> CustomLoss.compute(P, nil, [[-1.0] | bad], base_loss: :nll) end)},
          {"logprobs[0] is an improper list",
           quote(do: fn bad -> CustomLoss.compute(P, nil, [[-1.0 | bad]], base_loss: :nll) end)},
          {"data is an improper list",
           quote(do: fn bad -> CustomLoss.compute(P, [%{} | bad], [[-1.0]], base_loss: :nll) end)},
          {"data[0].model_input is an improper list",
           quote(
             do: fn bad ->
               CustomLoss.compute(P, [%{model_input: [1 | bad]}], [[-1.0]], base_loss: :nll)
             end
           )},
          {"expected data to be a list of datums",
           quote(
             do: fn bad ->
               client = {CustomLoss.Sandbox, self()}
               CustomLoss.forward_backward_custom(P, client, [%{} | bad], base_loss: :nll)
             end
           )},
          {"Tinkex.CustomLoss takes a keyword list of options",
           quote(do: fn bad -> CustomLoss.start_link([{:workers, 1} | bad]) end)}
        ] do
      test "says of an improper list: #{where}" do
        assert message(fn -> unquote(call).(7) end) =~ unquote(where)
      end
    end

    test "refuses two regularizers of one name" do
      kl = %{name: "kl", fn: :kl, weight: 1}

      assert message(fn -> compute(regularizers: [kl, kl]) end) =~
               ~s(two regularizers are named "kl")
    end

    test "refuses regularizers that are no list" do
      assert message(fn -> compute(regularizers: %{name: "a"}) end) =~
               "expected :regularizers to be a list"

      assert message(fn -> compute(regularizers: [name: "kl", fn: :kl, weight: 1]) end) =~
               "expected :regularizers to be a list of regularizers, got one"
    end

    test "shows an environment to nobody, and outlives the code that it was started with" do
      config = Options.start!(env: [{"TOKEN", "secret"}])
      refute inspect(config, limit: :infinity) =~ "secret"
      # A closure ends whoever holds it when its module is loaded anew twice.
      refute config |> Map.values() |> Enum.any?(&is_function/1)
    end

    test "needs a pool that runs" do
      assert {:error, %CustomLoss.WorkerError{reason: :not_running}} = compute(base_loss: :nll)
    end
  end
end
